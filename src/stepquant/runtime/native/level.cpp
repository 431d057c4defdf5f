// What the loader asks first. Compiled for every x86-64 machine.
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

// The digest of the sources, so that a library that is older than they are is not used.
extern "C" __attribute__((visibility("default"))) const char* sources() { return SOURCES; }
