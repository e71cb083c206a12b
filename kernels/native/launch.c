/*
 * launch: a compiled GPU kernel, started by the CUDA driver itself. The driver's library is opened when the first launch
 * asks for it, so that nothing here needs CUDA to build, and machines without a GPU to import.
 *
 * Triton decides for every call which of a kernel's compiled forms fits its arguments: pointers that are multiples of 16,
 * integers that are 1, multiples of 16 or beyond 32 bits, or that a kernel says have 64. `codes` holds, for each argument,
 * what the given form was compiled for; a call that does not fit it is not launched, and Triton's own launcher has to find
 * or make another.
 */
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "launch.h"

enum { MOST_ARGUMENTS = 64, ATTRIBUTE_COOPERATIVE = 2 };

/* Types of cuda.h, as far as a launch needs them; the layout is the driver's ABI and does not change. */
typedef struct {
    int id;
    char pad[4];
    union {
        char bytes[64];
        int value;
    } of;
} launch_attribute;

typedef struct {
    unsigned grid[3], block[3];
    unsigned shared_bytes;
    void *stream;
    launch_attribute *attributes;
    unsigned attribute_count;
} launch_config;

typedef int (*launch_function)(const launch_config *, void *function, void **parameters, void **extra);
typedef int (*error_function)(int, const char **);

static launch_function cuda_launch;
static error_function cuda_error_name;

#if defined(__linux__)
#include <dlfcn.h>

/* use_driver(path) -> None: opens the CUDA driver's library; RuntimeError where it is not there. */
PyObject *use_driver(PyObject *module, PyObject *path) {
    (void)module;
    PyObject *bytes = PyUnicode_AsUTF8String(path);
    if (!bytes)
        return 0;
    const char *name = PyBytes_AsString(bytes);
    void *library = name ? dlopen(name, RTLD_NOW | RTLD_LOCAL) : 0;
    Py_DECREF(bytes);
    if (library) {
        cuda_launch = (launch_function)dlsym(library, "cuLaunchKernelEx");
        cuda_error_name = (error_function)dlsym(library, "cuGetErrorName");
    }
    if (!library || !cuda_launch || !cuda_error_name) {
        const char *why = dlerror();
        return PyErr_Format(PyExc_RuntimeError, "no CUDA driver: %s", why ? why : "a function is missing");
    }
    Py_RETURN_NONE;
}
#else
PyObject *use_driver(PyObject *module, PyObject *path) {
    (void)module, (void)path;
    PyErr_SetString(PyExc_RuntimeError, "no CUDA driver: this system's libraries are not opened");
    return 0;
}
#endif

/* Does the value, an address or an integer, belong to what a code stands for? -1 is an address that is not there. */
static int fits(char code, int64_t value) {
    int narrow = value >= INT32_MIN && value <= INT32_MAX;
    switch (code) {
    case 'P':
        return value >= 0 && value % 16 == 0;
    case 'p':
        return value >= 0 && value % 16 != 0;
    case 'n':
        return value == -1;
    case '1':
        return value == 1;
    case 'D':
        return narrow && value % 16 == 0;
    case 'i':
        return narrow && value % 16 != 0 && value != 1;
    case 'I':
        return narrow;
    case 'L':
        return !narrow && value % 16 == 0;
    case 'l':
        return !narrow && value % 16 != 0;
    case 'X':
        return !narrow;
    case 'W':
        return 1;
    default:
        return 0;
    }
}

/*
 * launch(function, gx, gy, gz, threads, shared_bytes, cooperative, stream, codes, values) -> bool: whether the values fit
 * the codes and the kernel was launched. values: a tuple of integers. RuntimeError if the driver refuses the launch.
 */
PyObject *launch(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    if (count != 10)
        return PyErr_Format(PyExc_TypeError, "expected 10 arguments, got %zd", count);
    int64_t numbers[8];
    for (int i = 0; i < 8; i++) {
        numbers[i] = PyLong_AsLongLong(args[i]);
        if (numbers[i] == -1 && PyErr_Occurred())
            return 0;
    }
    char *codes;
    Py_ssize_t length;
    if (PyBytes_AsStringAndSize(args[8], &codes, &length))
        return 0;
    Py_ssize_t given = PyTuple_Size(args[9]);
    if (given < 0)
        return 0;
    if (given != length || length > MOST_ARGUMENTS)
        return PyErr_Format(PyExc_ValueError, "%zd values for %zd codes, at most %d", given, length, MOST_ARGUMENTS);
    if (!cuda_launch) {
        PyErr_SetString(PyExc_RuntimeError, "no CUDA driver: use_driver has not been called");
        return 0;
    }
    /* Parameters are read through pointers; the low bytes of a little-endian integer serve 32 bits as well. Two more for
     * the scratch memory that Triton's kernels have as last parameters: these kernels use none. */
    int64_t values[MOST_ARGUMENTS + 2];
    void *parameters[MOST_ARGUMENTS + 2];
    Py_ssize_t passed = 0;
    for (Py_ssize_t i = 0; i < length; i++) {
        int64_t value = PyLong_AsLongLong(PyTuple_GetItem(args[9], i));
        if (value == -1 && PyErr_Occurred())
            return 0;
        if (!fits(codes[i], value))
            Py_RETURN_FALSE;
        if (codes[i] != 'n' && codes[i] != '1') {
            values[passed] = value;
            parameters[passed] = &values[passed];
            passed++;
        }
    }
    for (int i = 0; i < 2; i++, passed++) {
        values[passed] = 0;
        parameters[passed] = &values[passed];
    }
    launch_attribute cooperative = {.id = ATTRIBUTE_COOPERATIVE, .of = {.value = 1}};
    launch_config config = {
        .grid = {(unsigned)numbers[1], (unsigned)numbers[2], (unsigned)numbers[3]},
        .block = {(unsigned)numbers[4], 1, 1},
        .shared_bytes = (unsigned)numbers[5],
        .stream = (void *)(intptr_t)numbers[7],
        .attributes = &cooperative,
        .attribute_count = numbers[6] ? 1 : 0,
    };
    int status;
    Py_BEGIN_ALLOW_THREADS status = cuda_launch(&config, (void *)(intptr_t)numbers[0], parameters, 0);
    Py_END_ALLOW_THREADS if (status) {
        const char *name = 0;
        cuda_error_name(status, &name);
        return PyErr_Format(PyExc_RuntimeError, "the CUDA driver refuses a launch: %s", name ? name : "unknown error");
    }
    Py_RETURN_TRUE;
}
