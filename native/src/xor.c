#include "xor.h"

/* Two sources at once halve the traffic of the destination; the compiler makes the loops wide. */
static void one(uint8_t *restrict to, const uint8_t *restrict a, size_t length)
{
    for (size_t i = 0; i < length; i++)
        to[i] ^= a[i];
}

static void two(uint8_t *restrict to, const uint8_t *restrict a, const uint8_t *restrict b,
                size_t length)
{
    for (size_t i = 0; i < length; i++)
        to[i] ^= a[i] ^ b[i];
}

/* In pieces that stay in the first-level cache. */
#define PIECE ((size_t)8192)

void native_xor(uint8_t *destination, const uint8_t *const *sources, size_t count, size_t length)
{
    for (size_t at = 0; at < length; at += PIECE) {
        size_t part = length - at < PIECE ? length - at : PIECE, i = 0;
        for (; i + 1 < count; i += 2)
            two(destination + at, sources[i] + at, sources[i + 1] + at, part);
        if (i < count)
            one(destination + at, sources[i] + at, part);
    }
}
