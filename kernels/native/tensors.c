/*
 * What Python's tensors are, many in one call: addresses, sizes, types, and whether they are plain memory.
 *
 * They are asked through DLPack's exchange table, which PyTorch offers for this: a function that describes a tensor and
 * owns nothing. It says nothing of views of the other sign and of inference tensors, which are asked by their methods.
 */
#include "tensors.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* The parts of dlpack.h (version 1) that are read here. */
typedef struct {
    void *data;
    int32_t device_type, device_id, ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} dl_tensor;

typedef struct dl_exchange {
    uint32_t major, minor;
    const struct dl_exchange *previous;
    void *allocate, *from_object, *to_object;
    int (*describe)(void *object, dl_tensor *result);
    void *stream;
} dl_exchange;

enum { DL_FLOAT = 2, DL_BFLOAT = 4, MAX_DIMS = 64 };
enum { FLOAT64, FLOAT32, FLOAT16, BFLOAT16, OTHER_KIND };
enum { ONE_DEVICE = 1, CONTIGUOUS = 2, SIDE_BY_SIDE = 4, APART = 8, ALIGNED = 16, ALIKE = 32 };
enum { COLUMNS = 4 }; /* of the table: addresses, numbers of elements, kinds, the others' addresses */

typedef struct {
    PyObject *types, *methods; /* tuples */
    int (*describe)(void *object, dl_tensor *result);
} questions;

static int described(const questions *ask, PyObject *object, dl_tensor *result) {
    int known = 0;
    for (Py_ssize_t i = 0; i < PyTuple_Size(ask->types); i++)
        known |= (PyObject *)Py_TYPE(object) == PyTuple_GetItem(ask->types, i);
    if (!known)
        return 0;
    for (Py_ssize_t i = 0; i < PyTuple_Size(ask->methods); i++) {
        PyObject *answer = PyObject_CallFunctionObjArgs(PyTuple_GetItem(ask->methods, i), object, NULL);
        if (!answer)
            return -1;
        int refused = answer != Py_False;
        Py_DECREF(answer);
        if (refused)
            return 0;
    }
    if (ask->describe(object, result)) { /* without memory: sparse, a transform's, ... */
        if (!PyErr_ExceptionMatches(PyExc_Exception))
            return -1;
        PyErr_Clear();
        return 0;
    }
    return result->ndim <= MAX_DIMS && result->lanes == 1;
}

/* 1 and the description of a list's tensor that is nothing but strided memory, 0 of another, -1 with an exception. */
static int item_described(const questions *ask, PyObject *list, Py_ssize_t index, dl_tensor *result) {
    PyObject *object = PyList_GetItem(list, index); /* NULL if a method that was asked has shortened the list */
    if (!object)
        return -1;
    Py_INCREF(object);
    int status = described(ask, object, result);
    Py_DECREF(object);
    return status;
}

static int64_t numel_of(const dl_tensor *t) {
    int64_t numel = 1;
    for (int i = 0; i < t->ndim; i++)
        numel *= t->shape[i];
    return numel;
}

static int64_t address_of(const dl_tensor *t) { return (int64_t)((uintptr_t)t->data + t->byte_offset); }

static int is_contiguous(const dl_tensor *t) {
    int64_t expected = 1;
    for (int i = t->ndim - 1; t->strides && i >= 0; i--) {
        if (t->shape[i] != 1 && t->strides[i] != expected)
            return 0;
        expected *= t->shape[i];
    }
    return 1;
}

/* Contiguous but for the order of the dimensions. */
static int is_side_by_side(const dl_tensor *t) {
    int64_t expected = 1;
    uint64_t left = 0;
    for (int i = 0; i < t->ndim; i++)
        left |= (uint64_t)(t->shape[i] != 1) << i;
    while (left) {
        int next = -1;
        for (int i = 0; i < t->ndim; i++)
            if (left >> i & 1 && t->strides[i] == expected)
                next = i;
        if (next < 0)
            return 0;
        expected *= t->shape[next];
        left &= ~((uint64_t)1 << next);
    }
    return 1;
}

static int64_t kind_of(const dl_tensor *t) {
    if (t->code == DL_BFLOAT && t->bits == 16)
        return BFLOAT16;
    if (t->code != DL_FLOAT)
        return OTHER_KIND;
    return t->bits == 64 ? FLOAT64 : t->bits == 32 ? FLOAT32 : t->bits == 16 ? FLOAT16 : OTHER_KIND;
}

static int is_alike(const dl_tensor *a, const dl_tensor *b) {
    if (a->device_type != b->device_type || a->device_id != b->device_id || a->ndim != b->ndim || a->code != b->code ||
        a->bits != b->bits)
        return 0;
    size_t bytes = (size_t)a->ndim * sizeof(int64_t);
    return !memcmp(a->shape, b->shape, bytes) && a->strides && b->strides && !memcmp(a->strides, b->strides, bytes);
}

typedef struct {
    uint64_t begin, end;
} span;

static int by_begin(const void *a, const void *b) {
    uint64_t x = ((const span *)a)->begin, y = ((const span *)b)->begin;
    return (x > y) - (x < y);
}

/* The memory of a tensor whose elements lie side by side; 0 if it has none. */
static int span_of(const dl_tensor *t, span *result) {
    uint64_t begin = (uint64_t)address_of(t), size = (uint64_t)numel_of(t) * (t->bits / 8);
    *result = (span){begin, begin + size};
    return size > 0;
}

static int apart(span *spans, Py_ssize_t count) {
    qsort(spans, (size_t)count, sizeof(span), by_begin);
    for (Py_ssize_t i = 1; i < count; i++)
        if (spans[i].begin < spans[i - 1].end)
            return 0;
    return 1;
}

/* Fills the table; what is true of all as flags, and the kinds as bits above them. -1 with an exception, 0: not plain. */
static int64_t surveyed(const questions *ask, PyObject *tensors, PyObject *others, int64_t *table, span *spans,
                        int64_t *elements) {
    Py_ssize_t count = PyList_Size(tensors), used = 0;
    int64_t flags = ONE_DEVICE | CONTIGUOUS | SIDE_BY_SIDE | ALIGNED | (others ? ALIKE : 0), kinds = 0;
    dl_tensor first = {0}, t, other;
    for (Py_ssize_t i = 0; i < count; i++) {
        int status = item_described(ask, tensors, i, &t);
        if (status <= 0)
            return status;
        if (i == 0)
            first = t;
        int64_t numel = numel_of(&t), kind = kind_of(&t);
        if (!t.data && numel > 0)
            return 0;
        if (t.device_type != first.device_type || t.device_id != first.device_id)
            flags &= ~ONE_DEVICE;
        if (numel > 0 && !is_contiguous(&t))
            flags &= is_side_by_side(&t) ? ~CONTIGUOUS : ~(CONTIGUOUS | SIDE_BY_SIDE);
        kinds |= (int64_t)1 << kind;
        *elements += numel;
        if (numel > 0 && address_of(&t) % 16)
            flags &= ~ALIGNED;
        table[i] = address_of(&t);
        table[count + i] = numel;
        table[2 * count + i] = kind;
        table[3 * count + i] = 0;
        if (!others) {
            used += span_of(&t, spans + used);
            continue;
        }
        status = item_described(ask, others, i, &other);
        if (status <= 0)
            return status;
        if (!other.data && numel_of(&other) > 0)
            return 0;
        if (!is_alike(&t, &other))
            flags &= ~ALIKE;
        if (numel_of(&other) > 0 && address_of(&other) % 16)
            flags &= ~ALIGNED;
        used += span_of(&other, spans + used);
        table[3 * count + i] = address_of(&other);
    }
    return (apart(spans, used) ? flags | APART : flags) | kinds << 8;
}

/*
 * survey(tensors, others, types, methods, exchange, table, bytes) -> (flags, elements), or None where one is not plain.
 * tensors, others: lists of as many, or None for others. types: what may be asked. methods: of which none may be true
 * of a tensor. exchange: the capsule. table: address of (4, count) int64, of so many bytes.
 */
PyObject *survey(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    (void)module;
    if (count != 7 || !PyList_Check(args[0]) || !(args[1] == Py_None || PyList_Check(args[1])) ||
        !PyTuple_Check(args[2]) || !PyTuple_Check(args[3]))
        return PyErr_Format(PyExc_TypeError, "expected two lists, two tuples, a capsule, an address and a size");
    const dl_exchange *exchange = PyCapsule_GetPointer(args[4], "dlpack_exchange_api");
    if (!exchange)
        return 0;
    while (exchange && exchange->major != 1)
        exchange = exchange->previous;
    if (!exchange || !exchange->describe)
        return PyErr_Format(PyExc_RuntimeError, "no exchange table of DLPack's version 1");
    int64_t at = PyLong_AsLongLong(args[5]), bytes = at == -1 && PyErr_Occurred() ? -1 : PyLong_AsLongLong(args[6]);
    if (PyErr_Occurred())
        return 0;
    PyObject *others = args[1] == Py_None ? 0 : args[1];
    Py_ssize_t tensors = PyList_Size(args[0]);
    if ((others && PyList_Size(others) != tensors) || bytes < 0 || bytes / COLUMNS / 8 < tensors || (!at && tensors))
        return PyErr_Format(PyExc_ValueError, "sizes, strides and buffers do not fit together: table");
    span *spans = malloc((size_t)(tensors + 1) * sizeof(span));
    if (!spans)
        return PyErr_NoMemory();
    questions ask = {args[2], args[3], exchange->describe};
    int64_t elements = 0, found = surveyed(&ask, args[0], others, (int64_t *)(uintptr_t)at, spans, &elements);
    free(spans);
    if (found < 0)
        return 0;
    if (found == 0)
        Py_RETURN_NONE;
    return Py_BuildValue("(LL)", (long long)found, (long long)elements);
}
