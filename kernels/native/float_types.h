/* Compiles TARGET_FILE for the instruction set ISA, once for each float type: see targets.h. */
#define TYPE f32
#include TARGET_FILE
#undef TYPE
#define TYPE f64
#define TYPE_IS_F64
#include TARGET_FILE
#undef TYPE
#undef TYPE_IS_F64
#undef ISA
#undef ISA_BYTES
