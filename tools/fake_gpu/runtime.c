/* What PyTorch asks of CUDA's runtime and of cuBLAS, answered by a GPU that is not there.

   Loaded before the real libraries (LD_PRELOAD), so that only what stands here is replaced. Memory is the host's and
   is only taken when it is touched; copies copy; events tell the host's time; a kernel that is launched does nothing
   but count. Functions that need no more than "yes" are in answers.c, which __main__.py writes. */

#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define YES return cudaSuccess
#define GIB ((size_t)1 << 30)

#ifndef SHARED /* an H100's */
#define MAJOR 9
#define MINOR 0
#define SHARED 232448
#endif

static const size_t total = 80 * GIB;
static size_t used;
static unsigned long launches, products;

/* For whoever counts (ctypes). */
unsigned long fake_gpu_launches(void) { return launches; }
unsigned long fake_gpu_products(void) { return products; }

/* ---- the device: in all but what a chip allows, an H100 -------------------------------------------------------- */
cudaError_t cudaGetDeviceCount(int *count) { *count = 1; YES; }
cudaError_t cudaGetDevice(int *device) { *device = 0; YES; }
cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; YES; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; YES; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; YES; }
cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int device) { strncpy(id, "0000:00:00.0", length); YES; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device)
{
    memset(p, 0, sizeof *p);
    strcpy(p->name, "a GPU that is not there");
    p->major = MAJOR;
    p->minor = MINOR;
    p->totalGlobalMem = total;
    p->multiProcessorCount = 132;
    p->warpSize = 32;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = SHARED;
    p->sharedMemPerMultiprocessor = SHARED + 1024;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->l2CacheSize = 50 << 20;
    p->unifiedAddressing = p->concurrentKernels = 1;
    YES;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device)
{
    switch (which) {
    case cudaDevAttrComputeCapabilityMajor: *value = MAJOR; break;
    case cudaDevAttrComputeCapabilityMinor: *value = MINOR; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMultiProcessorCount: *value = 132; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = SHARED; break;
    default: *value = 0;
    }
    YES;
}

/* ---- memory: a header page before each block keeps its size ---------------------------------------------------- */
#define PAGE 4096

static struct block { char *start; size_t size; } *blocks;
static size_t held, room;

/* For whoever checks accesses: where the block around an address starts, and its bytes; 0 where there is none. */
size_t fake_gpu_block(const char *address, char **start)
{
    for (size_t i = held; i-- > 0;)
        if (address >= blocks[i].start && address < blocks[i].start + blocks[i].size) {
            *start = blocks[i].start;
            return blocks[i].size;
        }
    return 0;
}

cudaError_t cudaMalloc(void **pointer, size_t size)
{
    if (used + size > total) return cudaErrorMemoryAllocation;
    char *block = mmap(NULL, size + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (block == MAP_FAILED) return cudaErrorMemoryAllocation;
    *(size_t *)block = size;
    *pointer = block + PAGE;
    used += size;
    if (held == room) blocks = realloc(blocks, (room = 2 * room + 64) * sizeof *blocks);
    blocks[held++] = (struct block){block + PAGE, size};
    YES;
}

cudaError_t cudaFree(void *pointer)
{
    if (pointer == NULL) YES;
    char *block = (char *)pointer - PAGE;
    size_t size = *(size_t *)block;
    used -= size;
    for (size_t i = held; i-- > 0;)
        if (blocks[i].start == pointer) {
            blocks[i] = blocks[--held];
            break;
        }
    munmap(block, size + PAGE);
    YES;
}

cudaError_t cudaMallocAsync(void **pointer, size_t size, cudaStream_t stream) { return cudaMalloc(pointer, size); }
cudaError_t cudaFreeAsync(void *pointer, cudaStream_t stream) { return cudaFree(pointer); }
cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned flags)
{
    return posix_memalign(pointer, 512, size ? size : 512) ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaFreeHost(void *pointer) { free(pointer); YES; }
cudaError_t cudaMemGetInfo(size_t *left, size_t *all) { *left = total - used; *all = total; YES; }

cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind)
{
    memmove(to, from, size);
    YES;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream)
{
    memmove(to, from, size);
    YES;
}
cudaError_t cudaMemset(void *to, int value, size_t size) { memset(to, value, size); YES; }
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) { memset(to, value, size); YES; }

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *pointer)
{
    memset(a, 0, sizeof *a);
    a->type = cudaMemoryTypeDevice;
    a->devicePointer = (void *)pointer;
    YES;
}

cudaError_t cudaGetSymbolAddress(void **pointer, const void *symbol)
{
    static char room[1 << 20];
    *pointer = room;
    YES;
}

/* ---- streams, events, graphs ----------------------------------------------------------------------------------- */
cudaError_t cudaStreamCreate(cudaStream_t *stream) { *stream = malloc(64); YES; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority)
{
    return cudaStreamCreate(stream);
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; YES; }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags)
{
    *event = calloc(1, sizeof(struct timespec));
    YES;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { free(event); YES; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    clock_gettime(CLOCK_MONOTONIC, (struct timespec *)event);
    YES;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags)
{
    return cudaEventRecord(event, stream);
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end)
{
    struct timespec *a = (struct timespec *)start, *b = (struct timespec *)end;
    *milliseconds = (b->tv_sec - a->tv_sec) * 1e3 + (b->tv_nsec - a->tv_nsec) * 1e-6;
    YES;
}

static cudaStream_t captured; /* the stream of the capture under way */
static int capturing, invalidated;
static unsigned long long captures;

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode)
{
    captured = stream;
    capturing = 1;
    invalidated = 0;
    captures++;
    YES;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph)
{
    capturing = 0;
    if (invalidated) return cudaErrorStreamCaptureInvalidated;
    *graph = malloc(8);
    YES;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    if (!capturing || stream != captured) YES;
    invalidated = 1;
    return cudaErrorStreamCaptureUnsupported;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status)
{
    *status = capturing && stream == captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    YES;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes,
                                     const cudaGraphEdgeData **edges, size_t *count)
{
    if (id) *id = captures;
    if (graph) *graph = (cudaGraph_t)32;
    if (nodes) *nodes = NULL;
    if (edges) *edges = NULL;
    if (count) *count = 0;
    return cudaStreamIsCapturing(stream, status);
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags)
{
    *made = malloc(8);
    YES;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) { *count = 1; YES; }
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode)
{
    *mode = cudaStreamCaptureModeGlobal;
    YES;
}

/* ---- kernels --------------------------------------------------------------------------------------------------- */
static __thread struct {
    dim3 grid, block;
    size_t shared;
    void *stream;
} configuration;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream)
{
    configuration.grid = grid;
    configuration.block = block;
    configuration.shared = shared;
    configuration.stream = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream)
{
    *grid = configuration.grid;
    *block = configuration.block;
    *shared = configuration.shared;
    *(void **)stream = configuration.stream;
    YES;
}

void **__cudaRegisterFatBinary(void *binary)
{
    static void *handle[1];
    return handle;
}
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterFunction(void **handle, const char *function, char *device, const char *name, int limit, void *t,
                            void *b, void *bd, void *gd, int *w) {}
void __cudaRegisterVar(void **handle, char *variable, char *address, const char *name, int ext, size_t size, int c,
                       int global) {}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) { *kernel = (cudaKernel_t)16; YES; }

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                               cudaStream_t stream)
{
    launches++;
    YES;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments)
{
    launches++;
    YES;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *function)
{
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 32;
    a->ptxVersion = a->binaryVersion = 90;
    YES;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads,
                                                                   size_t shared, unsigned flags)
{
    *blocks = 2;
    YES;
}

static int yes(void) { return 0; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *result)
{
    *function = (void *)yes;
    if (result) *result = cudaDriverEntryPointSuccess;
    YES;
}

/* ---- cuBLAS: every product counts as one launch ---------------------------------------------------------------- */
int cublasCreate_v2(void **handle) { *handle = malloc(64); return 0; }
int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { *mode = 0; return 0; }
size_t cublasLtGetVersion(void) { return 130000; }
int cublasLtMatmulDescCreate(void **made, int compute, int scale) { *made = malloc(8); return 0; }
int cublasLtMatmulDescDestroy(void *made) { free(made); return 0; }
int cublasLtMatmulPreferenceCreate(void **made) { *made = malloc(8); return 0; }
int cublasLtMatmulPreferenceDestroy(void *made) { free(made); return 0; }
int cublasLtMatrixLayoutCreate(void **made, int type, unsigned long rows, unsigned long cols, long ld)
{
    *made = malloc(8);
    return 0;
}
int cublasLtMatrixLayoutDestroy(void *made) { free(made); return 0; }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *matmul, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, void *results, int *found)
{
    memset(results, 0, 96); /* one cublasLtMatmulHeuristicResult_t: state 0, no workspace */
    *found = 1;
    return 0;
}
int cublasLtMatmul() { products++; return 0; }
int cublasGemmEx() { products++; return 0; }
int cublasSgemm_v2() { products++; return 0; }
int cublasDgemm_v2() { products++; return 0; }
int cublasSgemmEx() { products++; return 0; }
int cublasGemmStridedBatchedEx() { products++; return 0; }
int cublasSgemmStridedBatched() { products++; return 0; }
int cublasDgemmStridedBatched() { products++; return 0; }
int cublasSgemv_v2() { products++; return 0; }
int cublasDotEx() { products++; return 0; }
