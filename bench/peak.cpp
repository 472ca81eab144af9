// The most that one core multiplies and adds: rounds of 48 instructions on twelve independent sums of zeros, in registers.
#include <cstdint>

#define EV_PEAK(NAME, INSTRUCTION, WIDTH)                                                                                        \
  extern "C" void NAME(int64_t rounds) {                                                                                         \
    asm volatile(                                                                                                                \
        "vzeroall\n"                                                                                                             \
        "1:\n"                                                                                                                   \
        ".rept 4\n"                                                                                                              \
        ".irp sum, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11\n" INSTRUCTION " %%" WIDTH "14, %%" WIDTH "15, %%" WIDTH "\\sum\n.endr\n" \
        ".endr\n"                                                                                                                \
        "dec %0\n"                                                                                                               \
        "jnz 1b\n"                                                                                                               \
        "vzeroupper\n"                                                                                                           \
        : "+r"(rounds)::"cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",  \
        "xmm12", "xmm13", "xmm14", "xmm15");                                                                                     \
  }

EV_PEAK(vdpbf16ps, "vdpbf16ps", "zmm")
EV_PEAK(fma512, "vfmadd231ps", "zmm")
EV_PEAK(fma256, "vfmadd231ps", "ymm")
