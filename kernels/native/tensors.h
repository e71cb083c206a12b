/* What Python's tensors are, many in one call: tensors.c. */
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

PyObject *survey(PyObject *module, PyObject *const *args, Py_ssize_t count);
