#include "cuda_backend.h"

#include <array>
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string_view>

#include "dispatch.h"
#include "loaded_library.h"

namespace abba::cuda {
namespace {

template <typename... Arguments>
StableIValue call(const char* op, Arguments&&... arguments) {
  std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  return stack[0];
}

#ifdef ABBA_WITH_CUDA

// Asked once per device; no multiprocessors if this module has no code for it.
DeviceInfo info(int device) {
  static std::array<std::atomic<int>, 64> known{};  // 2 multiprocessors + sm90 + 1
  if (device < 0 || device >= static_cast<int>(known.size())) return {0, false};
  if (const int answer = known[device]) return {(answer - 1) / 2, (answer - 1) % 2 == 1};
  const torch::stable::accelerator::DeviceGuard guard(device);
  DeviceInfo answer;
  if (const int error = device_info(answer))
    throw std::runtime_error("abba_ext: cuda:" + std::to_string(device) + " does not say which kernels it can run: " + cuda_error(error));
  known[device] = 2 * answer.num_sms + answer.sm90 + 1;
  return answer;
}

// The kernels for Hopper have not been measured on a GPU yet: ABBA_SM90=1 asks for them.
bool sm90(int device) {
  const char* wanted = std::getenv("ABBA_SM90");
  return wanted && std::string_view(wanted) == "1" && info(device).sm90;
}

Dtype dtype_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: return Dtype::kFloat32;
  }
}

// By a function of 2.11's c_shim for CUDA: only CUDA builds of torch have that library, so this module is not linked to it.
void* current_stream(int device) {
  using Function = AOTITorchError(int32_t device_index, void** stream);
  constexpr const char *kLibrary = "libtorch_cuda.so", *kFunction = "aoti_torch_get_current_cuda_stream";
  static const auto function = reinterpret_cast<Function*>(find_loaded(kLibrary, kFunction));
  if (!function) throw std::runtime_error(std::string("abba_ext: torch's ") + kLibrary + " is not loaded or has no " + kFunction);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}

// A call that a kernel covers; it makes x's device the current one.
struct Call {
  torch::stable::accelerator::DeviceGuard guard;
  Launch launch;
  FactorPair factors;

  Call(const Tensor& x, const Tensor& f1, const Tensor& f2)
      : guard(x.get_device_index()),
        launch{x.size(0), x.size(1), dtype_of(x.scalar_type()), info(x.get_device_index()).num_sms,
               sm90(x.get_device_index()), current_stream(x.get_device_index())},
        factors{factor(f1), factor(f2), static_cast<int>(f1.size(0)), static_cast<int>(f2.size(0)), dtype_of(f1.scalar_type())} {}

  static Factor factor(const Tensor& f) { return {f.data_ptr(), f.stride(0), f.stride(1)}; }
  static Rows rows(const Tensor& t) { return {t.data_ptr(), t.stride(0)}; }
};

void check_launch(const char* op, int error) {
  if (error) throw std::runtime_error(std::string(op) + ": the CUDA kernel could not be launched: " + cuda_error(error));
}

Tensor workspace(const Tensor& like, size_t bytes) {
  return empty(like, 1, static_cast<int64_t>(bytes), ScalarType::Byte);
}

bool unit_inner_stride(const Tensor& t) { return t.size(1) <= 1 || t.stride(1) == 1; }

bool covered(const Tensor& x, const Tensor& u, const Tensor& f1, const Tensor& f2) {
  return unit_inner_stride(x) && unit_inner_stride(u) &&
         uncovered(x.scalar_type(), f1.scalar_type(), f1.size(0), f2.size(0), x.get_device_index()).empty();
}

#endif

}  // namespace

std::string uncovered(ScalarType activations, ScalarType factors, int64_t r1, int64_t r2, int device) {
#ifdef ABBA_WITH_CUDA
  if (activations != ScalarType::BFloat16 && activations != ScalarType::Half)
    return "the CUDA kernels take bfloat16 and float16 activations";
  if (factors != activations && factors != ScalarType::Float)
    return "the CUDA kernels take factors in the activations' dtype or in float32";
  if (r1 > kMaxRank1) return "the CUDA kernels take r1 up to " + std::to_string(kMaxRank1);
  if (r2 > kMaxRank2) return "the CUDA kernels take r2 up to " + std::to_string(kMaxRank2);
  if (info(device).num_sms == 0)
    return "abba_ext was built without code for this GPU's architecture, or with PTX that its driver is too old for";
  return "";
#else
  (void)activations, (void)factors, (void)r1, (void)r2, (void)device;
  return "abba_ext was built without CUDA";
#endif
}

bool takes_sm90(int64_t num_tokens, int64_t num_features, int64_t r1, int64_t r2, int device) {
#ifdef ABBA_WITH_CUDA
  if (r1 > kMaxRank1 || r2 > kMaxRank2) return false;
  const Launch launch{num_tokens, num_features, Dtype::kBFloat16, 0, sm90(device), nullptr};
  const FactorPair factors{{}, {}, static_cast<int>(r1), static_cast<int>(r2), Dtype::kFloat32};
  return expand_covered_by_sm90(launch, factors, {nullptr, num_features}, {nullptr, r1 * r2});
#else
  (void)num_tokens, (void)num_features, (void)r1, (void)r2, (void)device;
  return false;
#endif
}

void project(Tensor& u, const Tensor& x, const Tensor& f1, const Tensor& f2) {
#ifdef ABBA_WITH_CUDA
  if (covered(x, u, f1, f2)) {
    const Call call(x, f1, f2);
    const Tensor magnitudes = workspace(x, magnitudes_workspace(call.launch.dtype));
    check_launch("project", abba::project({call.launch, Call::rows(x), Call::rows(u), call.factors, magnitudes.data_ptr()}));
    return;
  }
#endif
  call("abba::project_composite", u, x, f1, f2);
}

void expand_(Tensor& y, const Tensor& u, const Tensor& f1, const Tensor& f2, double s) {
#ifdef ABBA_WITH_CUDA
  if (covered(y, u, f1, f2)) {
    const Call call(y, f1, f2);
    const Tensor magnitudes = workspace(y, magnitudes_workspace(call.launch.dtype));
    check_launch("expand_", abba::expand_({call.launch, Call::rows(y), Call::rows(u), call.factors, static_cast<float>(s),
                                           magnitudes.data_ptr()}));
    return;
  }
#endif
  call("abba::expand_composite", y, u, f1, f2, s);
}

void factor_grad(Tensor& df1, Tensor& df2, const Tensor& x, const Tensor& v, const Tensor& f1, const Tensor& f2, double s) {
#ifdef ABBA_WITH_CUDA
  if (covered(x, v, f1, f2)) {
    const Call call(x, f1, f2);
    const Tensor sums = workspace(x, factor_grad_workspace(call.launch, call.factors.r1, call.factors.r2));
    check_launch("factor_grad", abba::factor_grad({call.launch, Call::rows(x), Call::rows(v), call.factors, Call::factor(df1),
                                                   Call::factor(df2), static_cast<float>(s), sums.data_ptr()}));
    return;
  }
#endif
  call("abba::factor_grad_composite", df1, df2, x, v, f1, f2, s);
}

}  // namespace abba::cuda
