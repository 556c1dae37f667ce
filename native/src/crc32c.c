/* See crc32c.h. Derivations, with P the polynomial and all numbers bit-reflected:
 *
 * - A 64-bit word w stands for w(x), bit i being the coefficient of x^(63-i). The CRC instruction on
 *   (0, w) gives w(x) x^32 mod P, and so does it for each word of a message, one after another.
 * - clmul of two 32-bit numbers a, k, read as a 64-bit word, is a k x; of two 64-bit numbers, read as
 *   128 bits, it is a k x. So moving a checksum by n bits is the CRC of clmul(a, x^(n-33)), and moving
 *   a 128-bit lane by n bits is clmul(low, x^(n+63)) + clmul(high, x^(n-1)).
 */
#include "crc32c.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_acle.h>
#include <arm_neon.h>
#include <sys/auxv.h>
#include <asm/hwcap.h>
#endif

#define POLYNOMIAL 0x82F63B78u
/* Bytes of each of three streams: 3 * 1360 + 16 is a 4-KiB block. */
#define STREAM_LONG 1360
#define STREAM_SHORT 168

typedef uint32_t (*crc_function)(uint32_t crc, const uint8_t *data, size_t length);

static uint32_t table[8][256];
static uint32_t move_long, move_short; /* x^(8 n - 33) for both stream lengths */
static uint64_t fold_2048[2], fold_512[2], fold_lanes[8];

/* a b mod P; 0x80000000 is 1. */
static uint32_t multiply(uint32_t a, uint32_t b)
{
    uint32_t product = 0;
    for (int i = 31; i >= 0; i--) {
        if (a >> i & 1)
            product ^= b;
        b = (b >> 1) ^ (b & 1 ? POLYNOMIAL : 0);
    }
    return product;
}

/* x^n mod P */
static uint32_t power(uint64_t n)
{
    uint32_t result = 0x80000000u, square = 0x40000000u;
    for (; n; n >>= 1) {
        if (n & 1)
            result = multiply(result, square);
        square = multiply(square, square);
    }
    return result;
}

static void fold_constants(uint64_t *pair, unsigned bits)
{
    pair[0] = (uint64_t)power(bits + 63) << 32;
    pair[1] = (uint64_t)power(bits - 1) << 32;
}

static void make_tables(void)
{
    for (unsigned n = 0; n < 256; n++) {
        uint32_t crc = n;
        for (int bit = 0; bit < 8; bit++)
            crc = (crc >> 1) ^ (crc & 1 ? POLYNOMIAL : 0);
        table[0][n] = crc;
    }
    for (unsigned n = 0; n < 256; n++)
        for (int row = 1; row < 8; row++)
            table[row][n] = (table[row - 1][n] >> 8) ^ table[0][table[row - 1][n] & 0xFF];
    move_long = power(8 * STREAM_LONG - 33);
    move_short = power(8 * STREAM_SHORT - 33);
    fold_constants(fold_2048, 2048);
    fold_constants(fold_512, 512);
    fold_constants(fold_lanes + 0, 384);
    fold_constants(fold_lanes + 2, 256);
    fold_constants(fold_lanes + 4, 128);
    fold_lanes[6] = fold_lanes[7] = 0;
}

static uint64_t load64(const uint8_t *data)
{
    uint64_t word;
    memcpy(&word, data, 8);
    return word;
}

static uint32_t crc_bytewise(uint32_t crc, const uint8_t *data, size_t length)
{
    while (length--) {
        crc ^= *data++;
        for (int bit = 0; bit < 8; bit++)
            crc = (crc >> 1) ^ (crc & 1 ? POLYNOMIAL : 0);
    }
    return crc;
}

static uint32_t crc_table(uint32_t crc, const uint8_t *data, size_t length)
{
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    for (; length >= 8; length -= 8, data += 8) {
        uint64_t word = load64(data) ^ crc;
        crc = table[7][word & 0xFF] ^ table[6][word >> 8 & 0xFF] ^ table[5][word >> 16 & 0xFF] ^
              table[4][word >> 24 & 0xFF] ^ table[3][word >> 32 & 0xFF] ^
              table[2][word >> 40 & 0xFF] ^ table[1][word >> 48 & 0xFF] ^ table[0][word >> 56];
    }
#endif
    while (length--)
        crc = (crc >> 8) ^ table[0][(crc ^ *data++) & 0xFF];
    return crc;
}

#if defined(__x86_64__)
#define CRC_TARGET __attribute__((target("sse4.2,pclmul")))
#define crc_word(crc, word) ((uint32_t)_mm_crc32_u64((crc), (word)))
#define crc_byte(crc, byte) _mm_crc32_u8((crc), (byte))

CRC_TARGET static inline uint32_t moved(uint32_t crc, uint32_t by)
{
    __m128i product =
        _mm_clmulepi64_si128(_mm_cvtsi32_si128((int)crc), _mm_cvtsi32_si128((int)by), 0);
    return crc_word(0, (uint64_t)_mm_cvtsi128_si64(product));
}
#elif defined(__aarch64__)
#define CRC_TARGET __attribute__((target("+crc+crypto")))
#define crc_word(crc, word) __crc32cd((crc), (word))
#define crc_byte(crc, byte) __crc32cb((crc), (byte))

CRC_TARGET static inline uint32_t moved(uint32_t crc, uint32_t by)
{
    poly128_t product = vmull_p64((poly64_t)crc, (poly64_t)by);
    return crc_word(0, vgetq_lane_u64(vreinterpretq_u64_p128(product), 0));
}
#endif

#if defined(CRC_TARGET)
/* Three streams of `stream` bytes each, so that the latency of the instruction is hidden. */
CRC_TARGET static inline uint32_t three_streams(uint32_t crc, const uint8_t *data, size_t stream,
                                                uint32_t by)
{
    uint32_t second = 0, third = 0;
    for (size_t i = 0; i < stream; i += 8) {
        crc = crc_word(crc, load64(data + i));
        second = crc_word(second, load64(data + stream + i));
        third = crc_word(third, load64(data + 2 * stream + i));
    }
    return moved(moved(crc, by) ^ second, by) ^ third;
}

CRC_TARGET static uint32_t crc_streams(uint32_t crc, const uint8_t *data, size_t length)
{
    for (; length >= 3 * STREAM_LONG; length -= 3 * STREAM_LONG, data += 3 * STREAM_LONG)
        crc = three_streams(crc, data, STREAM_LONG, move_long);
    for (; length >= 3 * STREAM_SHORT; length -= 3 * STREAM_SHORT, data += 3 * STREAM_SHORT)
        crc = three_streams(crc, data, STREAM_SHORT, move_short);
    for (; length >= 8; length -= 8, data += 8)
        crc = crc_word(crc, load64(data));
    while (length--)
        crc = crc_byte(crc, *data++);
    return crc;
}
#endif

#if defined(__x86_64__)
#define WIDE_TARGET __attribute__((target("sse4.2,pclmul,avx512f,avx512vl,avx512dq,vpclmulqdq")))

WIDE_TARGET static inline __m512i folded(__m512i lanes, __m512i by, __m512i next)
{
    __m512i low = _mm512_clmulepi64_epi128(lanes, by, 0x00);
    __m512i high = _mm512_clmulepi64_epi128(lanes, by, 0x11);
    return _mm512_ternarylogic_epi64(low, high, next, 0x96);
}

WIDE_TARGET static inline __m512i pair_of(const uint64_t *pair)
{
    return _mm512_broadcast_i64x2(_mm_loadu_si128((const __m128i *)pair));
}

WIDE_TARGET static uint32_t crc_wide(uint32_t crc, const uint8_t *data, size_t length)
{
    if (length < 256)
        return crc_streams(crc, data, length);
    __m512i first = _mm512_castsi128_si512(_mm_cvtsi32_si128((int)crc));
    __m512i zero = _mm512_setzero_si512();
    __m512i a = _mm512_xor_si512(_mm512_loadu_si512(data),
                                 _mm512_inserti32x4(zero, _mm512_castsi512_si128(first), 0));
    __m512i b = _mm512_loadu_si512(data + 64), c = _mm512_loadu_si512(data + 128);
    __m512i d = _mm512_loadu_si512(data + 192), by = pair_of(fold_2048);
    for (data += 256, length -= 256; length >= 256; data += 256, length -= 256) {
        a = folded(a, by, _mm512_loadu_si512(data));
        b = folded(b, by, _mm512_loadu_si512(data + 64));
        c = folded(c, by, _mm512_loadu_si512(data + 128));
        d = folded(d, by, _mm512_loadu_si512(data + 192));
    }
    by = pair_of(fold_512);
    d = folded(folded(folded(a, by, b), by, c), by, d);
    for (; length >= 64; data += 64, length -= 64)
        d = folded(d, by, _mm512_loadu_si512(data));
    /* Four lanes to one; the last one stays where it is. */
    __m512i last = _mm512_inserti32x4(zero, _mm512_extracti32x4_epi32(d, 3), 0);
    d = folded(d, _mm512_loadu_si512(fold_lanes), last);
    __m128i lane = _mm_xor_si128(
        _mm_xor_si128(_mm512_extracti32x4_epi32(d, 0), _mm512_extracti32x4_epi32(d, 1)),
        _mm_xor_si128(_mm512_extracti32x4_epi32(d, 2), _mm512_extracti32x4_epi32(d, 3)));
    crc = crc_word(0, (uint64_t)_mm_cvtsi128_si64(lane));
    crc = crc_word(crc, (uint64_t)_mm_extract_epi64(lane, 1));
    return crc_streams(crc, data, length);
}
#endif

static const crc_function implementations[CRC32C_KINDS] = {
    [CRC32C_BYTEWISE] = crc_bytewise,
    [CRC32C_TABLE] = crc_table,
#if defined(__x86_64__)
    [CRC32C_SSE42] = crc_streams,
    [CRC32C_AVX512] = crc_wide,
#elif defined(__aarch64__)
    [CRC32C_ARMV8] = crc_streams,
#endif
};

static _Atomic(crc_function) chosen;
static pthread_once_t once = PTHREAD_ONCE_INIT;

int native_crc32c_supported(int kind)
{
    if (kind < 0 || kind >= CRC32C_KINDS || !implementations[kind])
        return 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (kind == CRC32C_SSE42 || kind == CRC32C_AVX512)
        if (!__builtin_cpu_supports("sse4.2") || !__builtin_cpu_supports("pclmul"))
            return 0;
    if (kind == CRC32C_AVX512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("vpclmulqdq");
#elif defined(__aarch64__)
    if (kind == CRC32C_ARMV8)
        return (getauxval(AT_HWCAP) & (HWCAP_CRC32 | HWCAP_PMULL)) == (HWCAP_CRC32 | HWCAP_PMULL);
#endif
    return 1;
}

int native_crc32c_select(int kind)
{
    pthread_once(&once, make_tables);
    if (kind < 0)
        for (kind = CRC32C_KINDS - 1; !native_crc32c_supported(kind);)
            kind--;
    if (!native_crc32c_supported(kind))
        return -1;
    atomic_store(&chosen, implementations[kind]);
    return kind;
}

static crc_function current(void)
{
    crc_function function = atomic_load_explicit(&chosen, memory_order_acquire);
    if (!function) {
        native_crc32c_select(-1);
        function = atomic_load(&chosen);
    }
    return function;
}

uint32_t native_crc32c(const uint8_t *data, size_t length, uint32_t crc)
{
    return ~current()(~crc, data, length);
}

void native_crc32c_blocks(const uint8_t *data, size_t length, size_t block, uint32_t *out)
{
    crc_function function = current();
    for (; length > block; data += block, length -= block)
        *out++ = ~function(~0u, data, block);
    if (length)
        *out = ~function(~0u, data, length);
}

int64_t native_crc32c_verify(const uint8_t *data, size_t length, size_t block,
                             const uint32_t *expected)
{
    crc_function function = current();
    for (int64_t index = 0; length; index++) {
        size_t part = length < block ? length : block;
        if (~function(~0u, data, part) != expected[index])
            return index;
        data += part;
        length -= part;
    }
    return -1;
}

void native_crc32c_blocks_list(const uint8_t *const *buffers, const size_t *lengths, size_t count,
                               size_t block, uint32_t *out)
{
    for (size_t i = 0; i < count; i++) {
        native_crc32c_blocks(buffers[i], lengths[i], block, out);
        out += (lengths[i] + block - 1) / block;
    }
}
