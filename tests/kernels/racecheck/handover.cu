// Does compute-sanitizer's racecheck follow the two ways in which a warp of a Triton kernel hands data to others?
//   nvcc -gencode=arch=compute_90a,code=sm_90a -o handover handover.cu && compute-sanitizer --tool racecheck --racecheck-report analysis ./handover
// Every kernel but race_control orders its writes before its reads by the PTX memory model; run without the sanitizer it also counts wrong values.
#include <cstdio>
#include <cstdint>

__device__ __forceinline__ uint32_t address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void init(uint64_t* bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(bar)), "r"(count) : "memory");
}
__device__ __forceinline__ void arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(bar)) : "memory");
}
__device__ __forceinline__ void wait(uint64_t* bar, int phase) {
  asm volatile(
      "{ .reg .pred done; again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1; @!done bra again; }"
      ::"r"(address(bar)), "r"(phase) : "memory");
}
#define BARRIER_1 asm volatile("barrier.sync 1;" ::: "memory")

// A real race: must be reported.
__global__ void race_control(int* wrong) {
  __shared__ volatile int value;
  if (threadIdx.x == 0) value = 1;
  if (threadIdx.x == 32 && value != 1) atomicAdd(wrong, 1);
}
// No race: must not be reported.
__global__ void syncthreads_control(int* wrong) {
  __shared__ volatile int value;
  for (int i = 0; i < 100; i++) {
    if (threadIdx.x == 0) value = i;
    __syncthreads();
    if (threadIdx.x >= 32 && value != i) atomicAdd(wrong, 1);
    __syncthreads();
  }
}
// As the tile scheduler: one warp writes numbers (all lanes the same ones), its lane 0 arrives at an mbarrier; four warps wait for it, read, and
// one of their threads arrives at a second mbarrier, after which the numbers may be overwritten.
template <bool ALL_LANES>
__device__ void scheduler(int* wrong) {
  __shared__ int tile[2][9];
  __shared__ uint64_t ready[2], empty[2];
  if (threadIdx.x == 0)
    for (int i = 0; i < 2; i++) { init(&ready[i], 1); init(&empty[i], 1); }
  __syncthreads();
  if (threadIdx.x < 32) {
    for (int i = 0; i < 100; i++) {
      int stage = i % 2;
      wait(&empty[stage], (i / 2 & 1) ^ 1);
      for (int field = 0; field < 9; field++) {
        if (ALL_LANES || threadIdx.x == 0) ((volatile int*)tile[stage])[field] = i + field;
        __syncwarp();
      }
      if (threadIdx.x == 0) arrive(&ready[stage]);
      __syncwarp();
    }
  } else {
    for (int i = 0; i < 100; i++) {
      int stage = i % 2;
      wait(&ready[stage], i / 2 & 1);
      int sum = 0;
      for (int field = 0; field < 9; field++) sum += ((volatile int*)tile[stage])[field] - field;
      if (sum != 9 * i) atomicAdd(wrong, 1);
      asm volatile("bar.sync 2, 128;" ::: "memory");
      if (threadIdx.x == 32) arrive(&empty[stage]);
    }
  }
}
__global__ void mbarrier_all_lanes_write(int* wrong) { scheduler<true>(wrong); }
__global__ void mbarrier_one_lane_writes(int* wrong) { scheduler<false>(wrong); }
// As Triton's warp specialisation: four warps write the arguments and the state, and all warps meet at barrier 1, at different instructions; the
// workers read, and meet the others again before these may write anew.
__global__ void barrier_hands_over_arguments(int* wrong) {
  __shared__ int arguments[8];
  __shared__ unsigned char state[8];
  if (threadIdx.x < 128) {
    for (int i = 0; i < 100; i++) {
      for (int j = 0; j < 8; j++) ((volatile int*)arguments)[j] = i + j;  // every thread, as Triton does
      ((volatile unsigned char*)state)[threadIdx.x & 7] = (unsigned char)i;
      BARRIER_1;
      BARRIER_1;
      asm volatile("bar.sync 0, 128;" ::: "memory");
      BARRIER_1;
    }
  } else {
    for (int i = 0; i < 100; i++) {
      BARRIER_1;
      int sum = ((volatile unsigned char*)state)[threadIdx.x / 32 - 4] != (unsigned char)i;
      for (int j = 0; j < 8; j++) sum += ((volatile int*)arguments)[j] != i + j;
      if (sum) atomicAdd(wrong, 1);
      BARRIER_1;
      BARRIER_1;
    }
  }
}

int main() {
  int* wrong;
  cudaMalloc(&wrong, 4);
  struct { const char* name; void (*kernel)(int*); int threads; } all[] = {
      {"race_control", race_control, 64},
      {"syncthreads_control", syncthreads_control, 160},
      {"mbarrier_all_lanes_write", mbarrier_all_lanes_write, 160},
      {"mbarrier_one_lane_writes", mbarrier_one_lane_writes, 160},
      {"barrier_hands_over_arguments", barrier_hands_over_arguments, 320},
  };
  for (auto& one : all) {
    int found = 0; cudaMemset(wrong, 0, 4);
    one.kernel<<<4, one.threads>>>(wrong);
    cudaError_t error = cudaMemcpy(&found, wrong, 4, cudaMemcpyDeviceToHost);
    printf("%s: %d wrong values, %s\n", one.name, found, cudaGetErrorString(error));
    fflush(stdout);
  }
  return 0;
}
