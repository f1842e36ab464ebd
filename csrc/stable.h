// The one include through which csrc reaches torch: the LibTorch stable ABI, fixed at 2.11, so that a build
// against any torch >= 2.11 loads into any other. Must come before every other torch header.
#pragma once
#define TORCH_TARGET_VERSION 0x020b000000000000

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

namespace abba {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

}  // namespace abba
