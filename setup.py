"""Folder mapping: the four folders stay visible at the top, two of them install inside charrnn_fast."""

from setuptools import find_packages, setup

MAPPED = {"charrnn_fast.kernels": "kernels", "charrnn_fast.reference": "reference"}


def packages() -> list[str]:
    found = find_packages(include=["charrnn_fast", "charrnn_fast.*"])
    for package, folder in MAPPED.items():
        found.append(package)
        found.extend(f"{package}.{name}" for name in find_packages(folder))
    return found


setup(packages=packages(), package_dir=MAPPED)
