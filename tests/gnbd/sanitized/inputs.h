/* What the harnesses of the server's and of the client's transmission have in common: chance, and
 * the loop over inputs that are made, or that were kept.
 *
 *     PROGRAM run SEED COUNT CURRENT     COUNT inputs; each is in the file CURRENT while it runs
 *     PROGRAM replay FILE...             inputs that were kept
 *
 * An input begins with SETTING_BYTES that choose the setting. What is drawn while it runs follows
 * from the input, so that a replay does the same. The harness says what an input is (make_input)
 * and what becomes of it (run_input), and how long it may be (INPUT_BYTES_MAX).
 */
#ifndef TESTS_INPUTS_H
#define TESTS_INPUTS_H

#include <assert.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SETTING_BYTES 8

static uint64_t chance;
static uint8_t *input;
static size_t input_length;

static void make_input(void);
static void run_input(void);

static uint64_t draw(uint64_t below)
{
    chance ^= chance << 13;
    chance ^= chance >> 7;
    chance ^= chance << 17;
    return below ? chance % below : chance;
}

static void run_one(void)
{
    assert(input_length >= SETTING_BYTES);
    chance = 88172645463325252ull ^ input_length;
    run_input();
}

static void replay(const char *path)
{
    FILE *file = fopen(path, "rb");
    assert(file);
    input_length = fread(input, 1, INPUT_BYTES_MAX, file);
    fclose(file);
    run_one();
}

static void run(uint64_t seed, uint64_t count, const char *path)
{
    int current = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    assert(current >= 0);
    for (uint64_t number = 0; number < count; number++) {
        chance = (seed + number) * 0x9e3779b97f4a7c15ull | 1;
        make_input();
        assert(pwrite(current, input, input_length, 0) == (ssize_t)input_length);
        assert(!ftruncate(current, (off_t)input_length));
        run_one();
    }
    close(current);
    printf("%llu inputs\n", (unsigned long long)count);
}

/* What main returns. */
static int run_inputs(int count, char **arguments)
{
    input = malloc(INPUT_BYTES_MAX);
    assert(input);
    int known = count == 5 && !strcmp(arguments[1], "run");
    if (known)
        run(strtoull(arguments[2], NULL, 10), strtoull(arguments[3], NULL, 10), arguments[4]);
    else if ((known = count >= 2 && !strcmp(arguments[1], "replay")))
        for (int i = 2; i < count; i++)
            replay(arguments[i]);
    fflush(stdout);
    free(input);
    return known ? 0 : 2;
}
#endif
