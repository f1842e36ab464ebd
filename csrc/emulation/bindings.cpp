// The launchers of launchers.h for Python, without torch: rows are (pointer, stride), a factor is (pointer, rank
// stride, feature stride), dtypes are torch's names of them.
#include <pybind11/pybind11.h>

#include <tuple>

#include "../launchers.h"
#include "control_bindings.h"

namespace abba {
namespace {

using RowsTuple = std::tuple<uintptr_t, int64_t>;
using FactorTuple = std::tuple<uintptr_t, int64_t, int64_t>;

Rows rows(const RowsTuple& r) { return {reinterpret_cast<void*>(std::get<0>(r)), std::get<1>(r)}; }

Factor factor(const FactorTuple& f) {
  return {reinterpret_cast<void*>(std::get<0>(f)), std::get<1>(f), std::get<2>(f)};
}

Dtype dtype(const std::string& name) {
  return emulation::choose<Dtype>(
      "dtype", name, {{"bfloat16", Dtype::kBFloat16}, {"float16", Dtype::kFloat16}, {"float32", Dtype::kFloat32}});
}

Launch launch(int64_t num_tokens, int64_t num_features, const std::string& name, int num_sms, bool sm90) {
  return {num_tokens, num_features, dtype(name), num_sms, sm90, nullptr};
}

void check(const char* launcher, int error) {
  if (error) throw std::runtime_error(std::string(launcher) + " returned error " + std::to_string(error));
}

}  // namespace
}  // namespace abba

PYBIND11_MODULE(EMULATED_MODULE, module) {
  using namespace abba;
  using namespace pybind11::literals;
  emulation::bind_control(module);
  module.def(
      "project",
      [](RowsTuple x, RowsTuple u, FactorTuple f1, FactorTuple f2, int r1, int r2, int64_t num_tokens,
         int64_t num_features, const std::string& name, const std::string& factor_name, int num_sms,
         bool sm90, uintptr_t workspace) {
        check("project", project({launch(num_tokens, num_features, name, num_sms, sm90), rows(x), rows(u),
                                  {factor(f1), factor(f2), r1, r2, dtype(factor_name)},
                                  reinterpret_cast<void*>(workspace)}));
      },
      pybind11::kw_only(), "x"_a, "u"_a, "f1"_a, "f2"_a, "r1"_a, "r2"_a, "num_tokens"_a, "num_features"_a, "dtype"_a,
      "factor_dtype"_a, "num_sms"_a, "sm90"_a, "workspace"_a);
  module.def(
      "expand_",
      [](RowsTuple y, RowsTuple u, FactorTuple f1, FactorTuple f2, float s, int r1, int r2, int64_t num_tokens,
         int64_t num_features, const std::string& name, const std::string& factor_name, int num_sms,
         bool sm90, uintptr_t workspace) {
        check("expand_", expand_({launch(num_tokens, num_features, name, num_sms, sm90), rows(y), rows(u),
                                  {factor(f1), factor(f2), r1, r2, dtype(factor_name)}, s,
                                  reinterpret_cast<void*>(workspace)}));
      },
      pybind11::kw_only(), "y"_a, "u"_a, "f1"_a, "f2"_a, "s"_a, "r1"_a, "r2"_a, "num_tokens"_a, "num_features"_a,
      "dtype"_a, "factor_dtype"_a, "num_sms"_a, "sm90"_a, "workspace"_a);
  module.def(
      "magnitudes_workspace", [](const std::string& name) { return magnitudes_workspace(dtype(name)); },
      pybind11::kw_only(), "dtype"_a);
  module.def(
      "factor_grad",
      [](RowsTuple x, RowsTuple v, FactorTuple f1, FactorTuple f2, FactorTuple df1, FactorTuple df2, float s,
         uintptr_t workspace, int r1, int r2, int64_t num_tokens, int64_t num_features, const std::string& name,
         const std::string& factor_name, int num_sms, bool sm90) {
        check("factor_grad", factor_grad({launch(num_tokens, num_features, name, num_sms, sm90), rows(x), rows(v),
                                          {factor(f1), factor(f2), r1, r2, dtype(factor_name)}, factor(df1),
                                          factor(df2), s, reinterpret_cast<void*>(workspace)}));
      },
      pybind11::kw_only(), "x"_a, "v"_a, "f1"_a, "f2"_a, "df1"_a, "df2"_a, "s"_a, "workspace"_a, "r1"_a, "r2"_a,
      "num_tokens"_a, "num_features"_a, "dtype"_a, "factor_dtype"_a, "num_sms"_a, "sm90"_a);
  module.def(
      "factor_grad_workspace",
      [](int r1, int r2, int64_t num_tokens, int64_t num_features, const std::string& name, int num_sms, bool sm90) {
        return factor_grad_workspace(launch(num_tokens, num_features, name, num_sms, sm90), r1, r2);
      },
      pybind11::kw_only(), "r1"_a, "r2"_a, "num_tokens"_a, "num_features"_a, "dtype"_a, "num_sms"_a, "sm90"_a);
}
