/* libcuda: what PyTorch, Triton and NVRTC's users ask the driver for. Virtual memory is in memory.c. */
#define _GNU_SOURCE
#include "null_gpu.h"

#include <stdlib.h>
#include <string.h>

int null_attribute(int *value, int attribute);
int null_launch(void);
const char *null_words(int error);

#define RETURNS_SUCCESS(name) EXPORT int name(void) { return null_error(); }
#define IS_UNSUPPORTED(name) EXPORT int name(void) { return NOT_SUPPORTED; }

static char context, module;

EXPORT int cuInit(unsigned flags) { return (void)flags, SUCCESS; }
EXPORT int cuDriverGetVersion(int *version) { return *version = 13000, SUCCESS; }
EXPORT int cuDeviceGetCount(int *count) { return *count = null_device_count(), SUCCESS; }

EXPORT int cuDeviceGet(int *device, int ordinal)
{
    if (ordinal < 0 || ordinal >= null_device_count())
        return INVALID_DEVICE;
    return *device = ordinal, SUCCESS;
}

EXPORT int cuDeviceGetName(char *name, int length, int device)
{
    (void)device;
    strncpy(name, null_model()->full_name, (size_t)length);
    return SUCCESS;
}

EXPORT int cuDeviceGetAttribute(int *value, int attribute, int device)
{
    (void)device;
    return null_attribute(value, attribute);
}

EXPORT int cuDeviceTotalMem_v2(size_t *bytes, int device)
{
    return (void)device, *bytes = null_model()->memory, SUCCESS;
}

EXPORT int cuCtxGetCurrent(void **current) { return *current = &context, SUCCESS; }
EXPORT int cuCtxGetDevice(int *device) { return *device = null_current_device(), SUCCESS; }
EXPORT int cuDevicePrimaryCtxRetain(void **current, int device)
{
    return (void)device, *current = &context, SUCCESS;
}
EXPORT int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active)
{
    (void)device;
    if (flags)
        *flags = 0;
    if (active)
        *active = 1;
    return SUCCESS;
}
RETURNS_SUCCESS(cuCtxSetCurrent)
RETURNS_SUCCESS(cuCtxPushCurrent_v2)
RETURNS_SUCCESS(cuCtxPopCurrent_v2)
RETURNS_SUCCESS(cuCtxSetLimit)
EXPORT int cuCtxGetLimit(size_t *bytes, int limit) { return (void)limit, *bytes = MIB, SUCCESS; }

EXPORT int cuGetErrorString(int error, const char **words)
{
    return *words = null_words(error), SUCCESS;
}
EXPORT int cuGetErrorName(int error, const char **name) { return cuGetErrorString(error, name); }

/* Every kernel: up to 1,024 threads, no local memory, 64 registers. */
EXPORT int cuFuncGetAttribute(int *value, int attribute, void *function)
{
    (void)function;
    *value = attribute == 0 ? 1024 : attribute == 4 ? 64 : 0;
    return SUCCESS;
}
RETURNS_SUCCESS(cuFuncSetAttribute)
RETURNS_SUCCESS(cuFuncSetCacheConfig)

EXPORT int cuModuleLoadData(void **loaded, const void *image)
{
    return (void)image, *loaded = &module, null_error();
}
EXPORT int cuModuleLoad(void **loaded, const char *path)
{
    return (void)path, *loaded = &module, null_error();
}
EXPORT int cuModuleGetFunction(void **function, void *loaded, const char *name)
{
    (void)loaded, (void)name;
    return *function = &module, null_error();
}
RETURNS_SUCCESS(cuModuleUnload)
IS_UNSUPPORTED(cuModuleLoadDataEx)
IS_UNSUPPORTED(cuLinkCreate_v2)
IS_UNSUPPORTED(cuLinkAddData_v2)
IS_UNSUPPORTED(cuLinkComplete)

EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks) { return *blocks = 2, SUCCESS; }
EXPORT int cuOccupancyMaxActiveClusters(int *clusters) { return *clusters = 66, SUCCESS; }

EXPORT int cuLaunchKernel(void) { return null_launch(); }
EXPORT int cuLaunchKernelEx(void) { return null_launch(); }
EXPORT int cuLaunchCooperativeKernel(void) { return null_launch(); }
RETURNS_SUCCESS(cuTensorMapEncodeTiled)

/* 1 context, 2 memory type, 9 device ordinal, 3 device pointer; PyTorch asks for no others. */
EXPORT int cuPointerGetAttribute(void *value, int attribute, uint64_t pointer)
{
    int device = null_device_of((void *)pointer);
    if (device < 0 && !null_is_pinned((void *)pointer))
        return INVALID_VALUE;
    if (attribute == 3)
        *(uint64_t *)value = pointer;
    else if (attribute == 2)
        *(unsigned *)value = device < 0 ? 1 : 2;
    else if (attribute == 9)
        *(int *)value = device < 0 ? null_current_device() : device;
    else if (attribute == 1)
        *(void **)value = &context;
    else
        return NOT_SUPPORTED;
    return SUCCESS;
}

EXPORT int cuStreamSynchronize(void *stream)
{
    (void)stream;
    __atomic_add_fetch(&null_counters()->host_waits, 1, __ATOMIC_RELAXED);
    return null_error();
}

EXPORT int cuMemsetD32Async(uint64_t to, unsigned value, size_t count, void *stream)
{
    (void)stream;
    for (size_t i = 0; i < count; i++)
        ((unsigned *)to)[i] = value;
    return null_error();
}
