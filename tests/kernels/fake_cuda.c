/* Stands for the CUDA driver's library: launches nothing, and keeps what it was asked to launch. The function's handle is
 * the number of parameters; 99 is a launch that the driver refuses. */
#include <stdint.h>
#include <string.h>

typedef struct {
    unsigned grid[3], block[3], shared;
    void *stream;
    struct {
        int id, pad, value;
        char rest[60];
    } *attributes;
    unsigned count;
} config;

int64_t asked[9], given[80];

int cuLaunchKernelEx(const config *how, void *function, void **parameters, void **extra) {
    (void)extra;
    int64_t n = (intptr_t)function;
    if (n == 99)
        return 1;
    for (int i = 0; i < 3; i++)
        asked[i] = how->grid[i], asked[3 + i] = how->block[i];
    asked[6] = how->shared, asked[7] = (intptr_t)how->stream;
    asked[8] = how->count && how->attributes->id == 2 ? how->attributes->value : -(int64_t)how->count;
    for (int i = 0; i < n; i++)
        memcpy(&given[i], parameters[i], 8);
    return 0;
}

int cuGetErrorName(int status, const char **name) {
    *name = status == 1 ? "CUDA_ERROR_INVALID_VALUE" : 0;
    return 0;
}
