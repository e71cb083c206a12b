#ifndef CHARRNN_LAUNCH_H
#define CHARRNN_LAUNCH_H

PyObject *use_driver(PyObject *module, PyObject *path);
PyObject *launch(PyObject *module, PyObject *const *args, Py_ssize_t count);

#endif
