/* CRC-32C (Castagnoli, reflected polynomial 0x82F63B78), the best implementation chosen at run time.
 *
 * All functions take and return finished checksums: crc32c(B, n, crc32c(A, m, 0)) is that of AB.
 */
#ifndef NATIVE_CRC32C_H
#define NATIVE_CRC32C_H

#include <stddef.h>
#include <stdint.h>

/* Chosen by native_crc32c_select; the order is from the slowest to the fastest. */
enum native_crc32c_kind {
    CRC32C_BYTEWISE = 0, /* the definition, for tests */
    CRC32C_TABLE = 1,    /* slicing by 8 */
    CRC32C_SSE42 = 2,    /* x86-64: three interleaved streams */
    CRC32C_AVX512 = 3,   /* x86-64: VPCLMULQDQ folding */
    CRC32C_ARMV8 = 4,    /* aarch64: three interleaved streams */
    CRC32C_KINDS = 5
};

/* 1 if this machine can run that implementation. */
int native_crc32c_supported(int kind);
/* Use `kind` from now on (-1: the best); returns the kind in use, or -1 if it is not supported. */
int native_crc32c_select(int kind);

uint32_t native_crc32c(const uint8_t *data, size_t length, uint32_t crc);

/* One checksum per block; the last block may be short. Writes ceil(length / block) values. */
void native_crc32c_blocks(const uint8_t *data, size_t length, size_t block, uint32_t *out);

/* Index of the first block whose checksum is not expected[i], or -1 when all are right. */
int64_t native_crc32c_verify(const uint8_t *data, size_t length, size_t block,
                             const uint32_t *expected);

/* The same as native_crc32c_blocks over `count` buffers, results one after another. */
void native_crc32c_blocks_list(const uint8_t *const *buffers, const size_t *lengths, size_t count,
                               size_t block, uint32_t *out);
#endif
