// The three CUDA launchers and what they are given. Free of torch, so that a kernel unit compiles in a second and the
// emulator builds it with nothing but g++. Shapes: T tokens, D features, R = r1*r2; strides are in elements.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace abba {

enum class Dtype { kBFloat16, kFloat16, kFloat32 };

// A factor [r, D] of any strides; one of them is usually 1.
struct Factor {
  void* data;
  int64_t rank_stride, feature_stride;
};

// f1 [r1, D] and f2 [r2, D]
struct FactorPair {
  Factor f1, f2;
  int r1, r2;
  Dtype dtype;  // the activations' or float32
};

// Rows of unit inner stride, `stride` apart: [T, D] or [T, R]
struct Rows {
  void* data;
  int64_t stride;
};

// What every launch needs besides. A stream is a cudaStream_t.
struct Launch {
  int64_t num_tokens;    // T >= 1
  int64_t num_features;  // D >= 1
  Dtype dtype;           // of the activations: bfloat16 or float16
  int num_sms;           // of the device
  bool sm90;             // take the Hopper kernels where they cover the call
  void* stream;
};

struct ProjectParams {
  Launch launch;
  Rows x;              // [T, D]
  Rows u;              // [T, R], written
  FactorPair factors;
  void* workspace;     // magnitudes_workspace(...) bytes
};

struct ExpandParams {
  Launch launch;
  Rows y;              // [T, D], added to
  Rows u;              // [T, R]
  FactorPair factors;
  float s;
  void* workspace;     // magnitudes_workspace(...) bytes
};

struct FactorGradParams {
  Launch launch;
  Rows x;              // [T, D]
  Rows v;              // [T, R]
  FactorPair factors;
  Factor df1, df2;     // [r1, D], [r2, D] in the factors' dtype, written
  float s;
  void* workspace;     // factor_grad_workspace(...) bytes, 16-byte aligned
};

// Each returns a cudaError_t: 0, or why the launch failed. Nothing waits for the device.
int project(const ProjectParams& p);
int expand_(const ExpandParams& p);
int factor_grad(const FactorGradParams& p);

// The same on Hopper, for calls that dispatch.h's covered_by_sm90 names. project and expand_ need the magnitudes.
int project_sm90(const ProjectParams& p);
int expand_sm90(const ExpandParams& p);
int factor_grad_sm90(const FactorGradParams& p);

// In float16, whose exponents are few, project and expand_ first look for the largest element of each factor.
size_t magnitudes_workspace(Dtype activations);
size_t factor_grad_workspace(const Launch& launch, int r1, int r2);

// The first launch of project and expand_ in float16: partial maxima of |f1| and |f2|, [2][32] float, into their workspace.
// In bfloat16 it does nothing.
int factor_magnitudes(const Launch& launch, const FactorPair& factors, void* workspace);

// Of the current device.
struct DeviceInfo {
  int num_sms;  // multiprocessors; 0 if the kernels were not compiled for it
  bool sm90;    // whether it is a Hopper GPU and the kernels for it are there
};
int device_info(DeviceInfo& info);  // a cudaError_t; that there is no code is an answer
std::string cuda_error(int error);

}  // namespace abba
