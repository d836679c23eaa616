/* What torch asks of CUDA's runtime before it launches anything, answered as one idle H200 would: cuda_code.py loads this
   in front of the real libraries. Nothing that it hands out is memory. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int Status;

Status cudaGetDeviceCount(int *count) { *count = 1; return 0; }
Status cudaGetDevice(int *device) { *device = 0; return 0; }
Status cudaSetDevice(int device) { return 0; }
Status cudaGetLastError(void) { return 0; }
Status cudaPeekAtLastError(void) { return 0; }
Status cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
Status cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
Status cudaDeviceGetAttribute(int *value, int attribute, int device) { *value = 0; return 0; }
Status cudaDeviceSynchronize(void) { return 0; }
Status cudaMemGetInfo(size_t *free, size_t *total) { *free = (size_t)130 << 30; *total = (size_t)140 << 30; return 0; }
Status cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
Status cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) {
  static intptr_t next = 0x1000;
  *stream = (void *)(next += 16);
  return 0;
}
Status cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
Status cudaStreamGetCaptureInfo(void *stream, int *status) { *status = 0; return 0; }
Status cudaStreamGetPriority(void *stream, int *priority) { *priority = 0; return 0; }
Status cudaStreamQuery(void *stream) { return 0; }
Status cudaStreamSynchronize(void *stream) { return 0; }
Status cudaThreadExchangeStreamCaptureMode(int *mode) { return 0; }
/* Constants of a graph are put onto the device: addresses that nobody reads. */
Status cudaMalloc(void **address, size_t size) {
  static intptr_t next = 0x7f0000000000;
  *address = (void *)next;
  next += (size + 0x1fffff) & ~(size_t)0x1fffff;
  return 0;
}
Status cudaFree(void *address) { return 0; }
Status cudaHostAlloc(void **address, size_t size, unsigned flags) { *address = malloc(size); return 0; }
Status cudaPointerGetAttributes(void *attributes, const void *address) { memset(attributes, 0, 24); return 0; }
Status cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) { return 0; }
Status cudaMemsetAsync(void *to, int value, size_t size, void *stream) { return 0; }
Status cudaLaunchKernel(void) { return 0; }
Status cudaEventCreateWithFlags(void **event, unsigned flags) { *event = (void *)1; return 0; }
Status cudaEventRecord(void *event, void *stream) { return 0; }
Status cudaEventRecordWithFlags(void *event, void *stream, unsigned flags) { return 0; }
Status cudaEventQuery(void *event) { return 0; }
Status cudaEventSynchronize(void *event) { return 0; }
Status cudaEventDestroy(void *event) { return 0; }
Status cudaStreamWaitEvent(void *stream, void *event, unsigned flags) { return 0; }
/* The fields that choose kernels, where struct cudaDeviceProp of CUDA 12 and 13 has them. */
Status cudaGetDeviceProperties(char *properties, int device) {
  memset(properties, 0, 1008);
  strcpy(properties, "NVIDIA H200");
  *(size_t *)(properties + 288) = (size_t)140 << 30; /* totalGlobalMem */
  *(size_t *)(properties + 296) = 49152;             /* sharedMemPerBlock */
  *(int *)(properties + 304) = 65536;                /* regsPerBlock */
  *(int *)(properties + 308) = 32;                   /* warpSize */
  *(int *)(properties + 320) = 1024;                 /* maxThreadsPerBlock */
  *(int *)(properties + 360) = 9;                    /* major */
  *(int *)(properties + 384) = 132;                  /* multiProcessorCount, of either version */
  *(int *)(properties + 388) = 132;
  return 0;
}
Status cudaGetDeviceProperties_v2(char *properties, int device) { return cudaGetDeviceProperties(properties, device); }
/* The driver's, which torch opens by name. */
Status cuInit(unsigned flags) { return 0; }
Status cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
Status cuGetErrorString(int error, const char **text) { *text = "no driver"; return 0; }
