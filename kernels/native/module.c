/*
 * _native: the kernels as functions of Python integers (sizes, strides in elements, addresses, sizes of buffers). What
 * does not fit its buffer is a ValueError. Written against the stable ABI, so that one build serves every Python.
 */
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <string.h>

#include "kernels.h"
#include "launch.h"
#include "scratch.h"
#include "tensors.h"

_Static_assert(sizeof(void *) == 8, "argument records hold addresses in 8 bytes");

enum { MAX_FIELDS = 64 };

static const char *const isa_names[ISA_COUNT] = {"baseline", "avx2", "avx512"};

static int machine_has(int isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (isa == ISA_AVX2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == ISA_AVX512)
        return machine_has(ISA_AVX2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512dq");
#endif
    return isa == ISA_BASELINE;
}

/* isas() -> names of the instruction sets that this machine can run, the best one last. */
static PyObject *isas(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    PyObject *names = PyList_New(0);
    for (int isa = 0; names && isa < ISA_COUNT; isa++) {
        PyObject *name = machine_has(isa) ? PyUnicode_FromString(isa_names[isa]) : 0;
        if (name && PyList_Append(names, name))
            Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

/* call(table, (isa, type, field, ...)): fills an argument record of `fields` 8-byte fields and runs the kernel. */
static PyObject *call(const kernel table[][2], const char *(*refused)(const void *, int64_t), PyObject *const *args,
                      Py_ssize_t count, Py_ssize_t fields) {
    int64_t record[MAX_FIELDS + 2];
    if (count != fields + 2)
        return PyErr_Format(PyExc_TypeError, "expected %zd integers, got %zd", fields + 2, count);
    for (Py_ssize_t i = 0; i < count; i++) {
        int64_t value = PyLong_AsLongLong(args[i]);
        if (value == -1 && PyErr_Occurred())
            return 0;
        record[i] = value;
    }
    if (record[0] < 0 || record[0] >= ISA_COUNT || record[1] < 0 || record[1] > 1 || !machine_has((int)record[0]))
        return PyErr_Format(PyExc_ValueError, "no kernel for instruction set %lld, type %lld", (long long)record[0],
                            (long long)record[1]);
    const char *why = refused(record + 2, record[1] ? 8 : 4);
    if (why)
        return PyErr_Format(PyExc_ValueError, "sizes, strides and buffers do not fit together: %s", why);
    int status;
    Py_BEGIN_ALLOW_THREADS status = table[record[0]][record[1]](record + 2);
    Py_END_ALLOW_THREADS if (status == STATUS_NO_MEMORY) return PyErr_NoMemory();
    if (status == STATUS_BAD_TOKEN) {
        PyErr_SetString(PyExc_IndexError, "index out of range in self");
        return 0;
    }
    Py_RETURN_NONE;
}

/* peak_scratch() -> the most bytes of working memory that the kernels held at once since the last call. */
static PyObject *peak_scratch(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyLong_FromLongLong(scratch_peak());
}

#define KERNEL_FUNCTION(name)                                                                                          \
    static PyObject *name(PyObject *module, PyObject *const *args, Py_ssize_t count) {                                 \
        (void)module;                                                                                                  \
        _Static_assert(sizeof(name##_args) / sizeof(int64_t) <= MAX_FIELDS, "the record has no room");                 \
        return call(name##_kernels, name##_refused, args, count, (Py_ssize_t)(sizeof(name##_args) / sizeof(int64_t))); \
    }
EACH_KERNEL(KERNEL_FUNCTION)

#define METHOD(name) {#name, (PyCFunction)(void (*)(void))name, METH_FASTCALL, 0},

static PyMethodDef methods[] = {
    {"isas", isas, METH_NOARGS, 0},
    {"peak_scratch", peak_scratch, METH_NOARGS, 0},
    {"use_driver", use_driver, METH_O, 0},
    METHOD(launch)
    METHOD(survey)
    EACH_KERNEL(METHOD)
    {0, 0, 0, 0},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_native",
    .m_doc = "CPU kernels of charrnn_fast: addresses and sizes in.",
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&definition); }
