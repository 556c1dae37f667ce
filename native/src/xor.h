/* Parity: destination ^= each of the sources. */
#ifndef NATIVE_XOR_H
#define NATIVE_XOR_H

#include <stddef.h>
#include <stdint.h>

void native_xor(uint8_t *destination, const uint8_t *const *sources, size_t count, size_t length);
#endif
