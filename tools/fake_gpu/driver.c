/* What Triton's launcher and PyTorch ask of CUDA's driver. The rest of the driver answers 0 (see __main__.py). */

#include <stdint.h>
#include <string.h>

#ifndef SHARED /* an H100's */
#define SHARED 232448
#endif

static unsigned long launches;

/* Who is to run what is launched (`--compiled`): gives CUDA's error, and leaves its text. */
typedef int (*runner)(void *function, const unsigned *sizes, void **arguments);
static runner run;
static char complaint[4096];
void fake_gpu_run_by(runner who) { run = who; }
void fake_gpu_complain(const char *text) { strncpy(complaint, text, sizeof complaint - 1); }

/* For whoever counts (ctypes). */
unsigned long fake_gpu_driver_launches(void) { return launches; }

int cuDeviceGet(int *device, int index) { *device = 0; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuDeviceGetAttribute(int *value, int which, int device)
{
    *value = which == 10 /* warp size */ ? 32 : which == 16 /* multiprocessors */ ? 132 : SHARED;
    return 0;
}
int cuModuleLoadData(void **module, const void *image) { *module = (void *)16; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name)
{
    static uint64_t functions = 16;
    *function = (void *)functions++; /* told apart by whoever runs them */
    return 0;
}
int cuFuncGetAttribute(int *value, int which, void *function) { *value = 1024; return 0; }
int cuPointerGetAttribute(void *value, int which, uint64_t pointer) { *(uint64_t *)value = pointer; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cuGetErrorString(int error, const char **text)
{
    *text = complaint[0] ? complaint : "an error of a GPU that is not there";
    return 0;
}
int cuGetErrorName(int error, const char **text) { *text = "FAKE"; return 0; }
int cuLaunchKernel() { launches++; return 0; }
/* Of a configuration the first seven numbers are the grid, the block and the bytes of shared memory. */
int cuLaunchKernelEx(const unsigned *config, void *function, void **arguments, void *extra)
{
    launches++;
    return run ? run(function, config, arguments) : 0;
}
