// What the loader asks first. Compiled for every x86-64 machine.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SOURCES
#error "SOURCES names the sources that the library is made of (native/build.py)"
#endif

// 2: AVX-512, 1: AVX2, 0: neither. The very flags that native/build.py compiles for.
extern "C" __attribute__((visibility("default"))) int best_level() {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (!avx2) return 0;
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 ? 2 : 1;
}

// 2: AMX's tiles, which Linux lends a process that asks; 1: AVX-512 VNNI; 0: neither.
extern "C" __attribute__((visibility("default"))) int best_products() {
    __builtin_cpu_init();
    if (best_level() < 2 || !__builtin_cpu_supports("avx512vnni")) return 0;
    unsigned a = 0, b = 0, c = 0, d = 0;
    // Tiles, products of 8-bit integers and of bfloat16 in them, and AVX-512's bfloat16.
    const bool amx = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 1) && (d >> 25 & 1) &&
                     (d >> 22 & 1) && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
    const long ask_for_state = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return amx && syscall(SYS_arch_prctl, ask_for_state, tile_data) == 0 ? 2 : 1;
}

// The digest of the sources, so that a library that is older than they are is not used.
extern "C" __attribute__((visibility("default"))) const char* sources() { return SOURCES; }
