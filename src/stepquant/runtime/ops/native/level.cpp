// What the loader asks first. Compiled for every machine of a family.
#include <cstddef>
#include <string>
#include <type_traits>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#else
#include <sys/auxv.h>
#endif

#include "abi.h"

#ifndef SOURCES
#error "SOURCES names the sources that the library is made of (native/build.py)"
#endif

#if defined(__x86_64__)

// 2: AVX-512, 1: AVX2, 0: neither. The very flags that native/build.py compiles for.
extern "C" __attribute__((visibility("default"))) int best_level() {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (!avx2) return 0;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 ? 2 : 1;
}

namespace {

unsigned bit(unsigned word, int place) { return word >> place & 1; }

}  // namespace

// Bit i: the machine runs the products of number i of X86.product_levels in native/build.py, that is
// 0: AVX2, 1: AVX-VNNI, 2: AVX-512 VNNI, 3: AMX's tiles, which Linux lends a process that asks.
extern "C" __attribute__((visibility("default"))) int product_levels() {
    __builtin_cpu_init();
    const int best = best_level();
    if (best < 1) return 0;
    unsigned a = 0, b = 0, c = 0, d = 0, a1 = 0, b1 = 0, c1 = 0, d1 = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 1;
    if (a >= 1) __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1);
    const bool vnni = best == 2 && __builtin_cpu_supports("avx512vnni");
    // Tiles, products of 8-bit integers and of bfloat16 in them, and AVX-512's bfloat16.
    const bool amx = vnni && bit(d, 24) && bit(d, 25) && bit(d, 22) && bit(a1, 5);
    const long ask_for_state = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    const bool lent = amx && syscall(SYS_arch_prctl, ask_for_state, tile_data) == 0;
    return 1 | int(bit(a1, 4)) << 1 | int(vnni) << 2 | int(lent) << 3;
}

#else  // ARM

// Every 64-bit ARM CPU runs the one level that there is.
extern "C" __attribute__((visibility("default"))) int best_level() { return 0; }

namespace {

#if defined(__APPLE__)

bool has(const char* feature) {
    int found = 0;
    size_t size = sizeof found;
    return sysctlbyname(feature, &found, &size, nullptr, 0) == 0 && found;
}

bool dot_products() { return has("hw.optional.arm.FEAT_DotProd"); }
bool matrix_products() { return has("hw.optional.arm.FEAT_I8MM"); }

#else

// HWCAP_ASIMDDP and HWCAP2_I8MM, which older headers lack.
bool dot_products() { return getauxval(AT_HWCAP) >> 20 & 1; }
bool matrix_products() { return getauxval(AT_HWCAP2) >> 13 & 1; }

#endif

}  // namespace

// Bit i: the machine runs the products of number i of ARM.product_levels in native/build.py, that is
// 0: NEON, 1: its dot products, 2: its matrix products of bytes.
extern "C" __attribute__((visibility("default"))) int product_levels() {
    return 1 | int(dot_products()) << 1 | int(matrix_products()) << 2;
}

#endif

// The digest of the sources, so that a library that is older than they are is not used.
extern "C" __attribute__((visibility("default"))) const char* sources() { return SOURCES; }

namespace {

std::string listed(std::initializer_list<std::pair<const char*, size_t>> numbers) {
    std::string line;
    for (const auto& each : numbers)
        line += (line.empty() ? "" : ", ") + std::string(each.first) + ' ' +
                std::to_string(each.second);
    return line + '\n';
}

template <typename T>
std::string structure(const char* name,
                      std::initializer_list<std::pair<const char*, size_t>> offsets) {
    static_assert(std::is_standard_layout<T>::value, "offsets are those of C");
    return std::string(name) + ' ' + std::to_string(sizeof(T)) + ": " + listed(offsets);
}

std::string described() {
#define AT(type, field) {#field, offsetof(type, field)}
    std::string text;
    text += structure<Image>("Image", {AT(Image, data), AT(Image, bf16), AT(Image, channels),
                                       AT(Image, stride_b), AT(Image, stride_c),
                                       AT(Image, stride_h), AT(Image, stride_w)});
    text += structure<Shape>("Shape", {AT(Shape, batch), AT(Shape, channels), AT(Shape, height),
                                       AT(Shape, width)});
    text += structure<Grid>("Grid", {AT(Grid, scale), AT(Grid, zero_point), AT(Grid, row),
                                     AT(Grid, rows), AT(Grid, largest), AT(Grid, factors)});
    text += structure<Output>("Output", {AT(Output, codes), AT(Output, start),
                                         AT(Output, channels), AT(Output, pad_h),
                                         AT(Output, pad_w), AT(Output, grid)});
    text += structure<Rows>("Rows", {AT(Rows, data), AT(Rows, bf16), AT(Rows, batch),
                                     AT(Rows, count), AT(Rows, channels)});
    text += structure<Codes>(
        "Codes", {AT(Codes, codes), AT(Codes, batch), AT(Codes, height), AT(Codes, width),
                  AT(Codes, channels), AT(Codes, stride_b), AT(Codes, stride_h),
                  AT(Codes, stride_w), AT(Codes, taps_h), AT(Codes, taps_w), AT(Codes, tap_h),
                  AT(Codes, tap_w)});
    text += structure<Weight>("Weight", {AT(Weight, tiles), AT(Weight, four_bits),
                                         AT(Weight, out_channels), AT(Weight, scale),
                                         AT(Weight, sums), AT(Weight, bias),
                                         AT(Weight, step_bias)});
    text += structure<Result>("Result", {AT(Result, data), AT(Result, bf16), AT(Result, added),
                                         AT(Result, added_bf16), AT(Result, gate),
                                         AT(Result, gate_stride)});
    text += structure<Encoded>("Encoded", {AT(Encoded, codes), AT(Encoded, activation),
                                           AT(Encoded, gated), AT(Encoded, grid)});
    text += structure<Attention>(
        "Attention", {AT(Attention, q), AT(Attention, k), AT(Attention, v),
                      AT(Attention, query_stride), AT(Attention, key_stride),
                      AT(Attention, value_stride), AT(Attention, batch), AT(Attention, heads),
                      AT(Attention, head_dim), AT(Attention, queries), AT(Attention, keys),
                      AT(Attention, codes), AT(Attention, grid)});
#undef AT
    text += "Activation: " + listed({{"none", kNone}, {"silu", kSilu}, {"gelu", kGelu},
                                     {"gelu_tanh", kGeluTanh}});
    text += "Status: " + listed({{"done", kDone}, {"row_outside", kRowOutside},
                                 {"no_memory", kNoMemory},
                                 {"not_finite", kNotFinite}});
    return text;
}

}  // namespace

// The layout of abi.h as this compiler made it, one line for each structure: its name and size, then
// its fields with their offsets. native/structures.py writes the same text.
extern "C" __attribute__((visibility("default"))) const char* layout() {
    static const std::string text = described();
    return text.c_str();
}
