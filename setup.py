"""Folder mapping and the optional C extension; everything else stands in pyproject.toml.

The four folders stay visible at the top, three of them install inside charrnn_fast. Without a C compiler the install
goes on and the "torch" backend serves.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

MAPPED = {"charrnn_fast.kernels": "kernels", "charrnn_fast.reference": "reference", "charrnn_fast.bench": "bench"}
FLAGS = ["-O3", "-g0", "-std=gnu11", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
# Of bench, what needs a checkout: the gate and the static figures, with what reads PTX for them, and the recipes' runs.
CHECKOUT_ONLY = ("conftest", "test_", "gate", "ptx", "recipes", "scaling", "static", "wavefronts")
PROBE = "#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n"


class BuildNative(build_ext):
    """Adds OpenMP where the compiler has it; without it the kernels run on one thread."""

    def build_extension(self, ext: Extension) -> None:
        if self._has_openmp():
            ext.extra_compile_args.append("-fopenmp")
            ext.extra_link_args.append("-fopenmp")
        super().build_extension(ext)

    def _has_openmp(self) -> bool:
        folder = tempfile.mkdtemp()
        source = Path(folder) / "probe.c"
        source.write_text(PROBE)
        try:
            objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=["-fopenmp"])
            self.compiler.link_executable(objects, str(Path(folder) / "probe"), extra_postargs=["-fopenmp"])
        except Exception:  # whatever a compiler's driver raises, the answer is no
            return False
        finally:
            shutil.rmtree(folder)
        return True


class BuildPython(build_py):
    """Leaves out the programs and pytest suites of bench that run from a checkout."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        if package != "charrnn_fast.bench":
            return modules
        return [row for row in modules if not row[1].startswith(CHECKOUT_ONLY)]


def packages() -> list[str]:
    found = find_packages(include=["charrnn_fast", "charrnn_fast.*"])
    for package, folder in MAPPED.items():
        found.append(package)
        found.extend(f"{package}.{name}" for name in find_packages(folder))
    return found


def extensions() -> list[Extension]:
    if sys.platform == "win32":  # the kernels are written in the vector extensions of GCC and Clang
        return []
    folder = Path("kernels", "native")
    return [
        Extension(
            "charrnn_fast.kernels.native._native",
            sources=sorted(str(path) for path in folder.glob("*.c")),
            depends=sorted(str(path) for path in folder.glob("*.[ch]")),
            define_macros=[("Py_LIMITED_API", "0x030A0000")],
            extra_compile_args=list(FLAGS),
            libraries=["dl"] if sys.platform == "linux" else [],
            py_limited_api=True,
            optional=True,
        )
    ]


setup(
    packages=packages(),
    package_dir=MAPPED,
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
    include_package_data=False,
    package_data={"charrnn_fast": ["py.typed"]},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
