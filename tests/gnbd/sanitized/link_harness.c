/* The client's transmission in C under sanitizers: made-up and mutated streams of replies.
 *
 * An input (inputs.h): the setting, 4 bytes for each request, then what the server sends.
 * Memory of requests is exactly as long as they say, and freed as soon as the link must not use it
 * any more. Without mutations each byte must come to its place.
 */
#define _GNU_SOURCE
#include "../../../native/src/crc32c.h"
#include "../../../native/src/nbd_link.h"

#include <endian.h>
#include <sys/socket.h>

#define INPUT_BYTES_MAX ((size_t)16 << 20)
#include "inputs.h"

#define POST_BYTES 4
#define POSTS_MAX 64
#define LENGTH_MAX 200000

enum { POSTS, PIECE, EARLY, MOVES, CLOSES, MUTATED }; /* of the setting */

/* ---- making inputs ---- */

static void put(const void *data, size_t length)
{
    assert(input_length + length <= INPUT_BYTES_MAX);
    memcpy(input + input_length, data, length);
    input_length += length;
}

static unsigned post_count(void)
{
    return 1 + input[POSTS] % POSTS_MAX;
}

static int post_ways(const uint8_t *post)
{
    static const int ways[] = {LINK_RECEIVES, LINK_RECEIVES, LINK_SENDS, LINK_NO_DATA,
                               LINK_RECEIVES | LINK_TRAILER, LINK_SENDS | LINK_TRAILER};
    int found = ways[post[0] % (sizeof ways / sizeof *ways)];
    return found == LINK_SENDS && post[0] & 64 ? found | LINK_COMPARES : found;
}

static uint32_t post_length(const uint8_t *post)
{
    return (post[1] | post[2] << 8 | post[3] << 16) % LENGTH_MAX;
}

static int has_sums(const uint8_t *post)
{
    return post_ways(post) & LINK_TRAILER || post[0] >= 128;
}

/* Each request has its own bytes. */
static const uint8_t *content(unsigned post)
{
    static uint8_t pattern[LENGTH_MAX + POSTS_MAX * 5];
    if (!pattern[1])
        for (size_t at = 0; at < sizeof pattern; at++)
            pattern[at] = (uint8_t)(at * 2654435761u >> 13 | (at == 1));
    return pattern + (size_t)post * 5;
}

static void make_reply(unsigned post, const uint8_t *posts)
{
    const uint8_t *what = posts + post * POST_BYTES;
    uint32_t length = post_length(what), error = draw(8) ? 0 : 5;
    int differs = post_ways(what) & LINK_COMPARES && draw(2);
    if (differs)
        error = LINK_MISMATCH;
    uint64_t cookie = htobe64((uint64_t)(post + 1) * LINK_REQUESTS_MAX + post);
    uint32_t head[2] = {htobe32(0x67446698), htobe32(error)};
    put(head, sizeof head);
    put(&cookie, sizeof cookie);
    if (differs)
        put(content(post), LINK_PLACE_BYTES);
    if (error || !(post_ways(what) & LINK_RECEIVES))
        return;
    const uint8_t *data = content(post);
    put(data, length);
    if (post_ways(what) & LINK_TRAILER)
        for (uint32_t at = 0; at < length; at += LINK_BLOCK_BYTES) {
            uint32_t rest = length - at;
            uint32_t sum = native_crc32c(
                data + at, rest < LINK_BLOCK_BYTES ? rest : LINK_BLOCK_BYTES, 0);
            put(&(uint32_t){htobe32(sum)}, 4);
        }
}

static void mutate(size_t first)
{
    size_t at = first + draw(input_length - first + 1), rest = input_length - at, part = draw(64);
    part = part > rest ? rest : part;
    switch (draw(4)) {
    case 0:
        input_length = at;
        break;
    case 1:
        memmove(input + at, input + at + part, rest - part);
        input_length -= part;
        break;
    case 2:
        if (rest)
            input[at] ^= (uint8_t)(1 << draw(8));
        break;
    default:
        for (size_t i = 0; i < part; i++)
            input[at + i] = (uint8_t)draw(256);
    }
}

static void make_input(void)
{
    unsigned order[POSTS_MAX];
    input_length = SETTING_BYTES;
    for (int i = 0; i < SETTING_BYTES; i++)
        input[i] = (uint8_t)draw(256);
    input[POSTS] = (uint8_t)draw(draw(8) ? 8 : POSTS_MAX);
    unsigned count = post_count();
    for (unsigned post = 0; post < count; post++) {
        uint32_t length = (uint32_t)draw(draw(16) ? 9000 : LENGTH_MAX);
        uint8_t what[POST_BYTES] = {(uint8_t)draw(256), (uint8_t)length, (uint8_t)(length >> 8),
                                    (uint8_t)(length >> 16)};
        put(what, sizeof what);
        unsigned other = (unsigned)draw(draw(2) ? post + 1 : 1 + post % 3);
        order[post] = post;
        other = post - (other > post ? post : other);
        order[post] = order[other];
        order[other] = post;
    }
    size_t first = input_length;
    for (unsigned i = 0; i < count; i++)
        make_reply(order[i], input + SETTING_BYTES);
    input[MUTATED] = draw(2) ? 0 : 1 + (uint8_t)draw(5);
    for (int left = input[MUTATED]; left; left--)
        mutate(first);
}

/* ---- running them ---- */

struct memory {
    uint8_t *data;
    uint32_t *sums;
    uint32_t length, block_count;
    int place, under_way;
};

static struct memory memories[POSTS_MAX];

static void take_memory(struct memory *memory, const uint8_t *what, unsigned post)
{
    memory->length = post_length(what);
    memory->block_count = memory->length / 4096 + !!(memory->length % 4096);
    memory->data = malloc(memory->length ? memory->length : 1);
    memory->sums = has_sums(what) ? malloc(memory->block_count * 4 + 1) : NULL;
    if (post_ways(what) & LINK_SENDS)
        memcpy(memory->data, content(post), memory->length);
}

static void free_memory(struct memory *memory)
{
    free(memory->data);
    free(memory->sums);
    memory->data = NULL;
    memory->sums = NULL;
}

static void check(struct memory *memory, unsigned post, const uint8_t *what, uint32_t error)
{
    if (input[MUTATED])
        return;
    assert(!error || error == 5 || (error == LINK_MISMATCH && post_ways(what) & LINK_COMPARES));
    if (error || !post_ways(what))
        return;
    assert(!memcmp(memory->data, content(post), memory->length));
    if (memory->sums)
        assert(native_crc32c_verify(memory->data, memory->length, 4096, memory->sums) < 0);
}

static void take_done(struct native_link *link, int count)
{
    for (int i = 0; i < count; i++) {
        uint64_t post = native_link_tags(link)[i];
        assert(post < post_count() && memories[post].under_way);
        memories[post].under_way = 0;
        check(&memories[post], (unsigned)post, input + SETTING_BYTES + post * POST_BYTES,
              native_link_errors(link)[i]);
        free_memory(&memories[post]);
    }
}

static void move_one(struct native_link *link)
{
    unsigned post = (unsigned)draw(post_count());
    const uint8_t *what = input + SETTING_BYTES + post * POST_BYTES;
    struct memory *memory = &memories[post], old = *memory;
    if (!memory->under_way) {
        assert(!native_link_move(link, memory->place, post, input, NULL));
        return;
    }
    take_memory(memory, what, post);
    if (old.sums)
        memcpy(memory->sums, old.sums, (size_t)old.block_count * 4);
    assert(native_link_move(link, memory->place, post, memory->data, memory->sums));
    free_memory(&old);
}

static int send_all(struct native_link *link, int peer)
{
    uint8_t room[70000];
    int left = 1;
    while (left > 0) {
        left = native_link_send(link);
        while (recv(peer, room, sizeof room, MSG_DONTWAIT) > 0)
            ;
        if (input[MOVES] % 4 == 1 && !draw(8))
            move_one(link);
    }
    return left;
}

/* What stands behind the setting, from `at` on. */
static void talk(struct native_link *link, int peer, size_t at)
{
    size_t piece = input[PIECE] % 2 ? 1 + draw(40) * input[PIECE] : 1 + draw(300000);
    if (piece < 40 && input_length > 20000)
        piece = 5000;
    int result = 0;
    while (result >= 0 && at < input_length) {
        size_t length = input_length - at < piece ? input_length - at : piece;
        ssize_t sent = send(peer, input + at, length, MSG_DONTWAIT | MSG_NOSIGNAL);
        at += sent > 0 ? (size_t)sent : 0;
        result = native_link_receive(link);
        take_done(link, result);
        if (input[MOVES] % 4 < 2 && !draw(4))
            move_one(link);
        if (input[CLOSES] % 8 == 0 && !draw(8))
            return;
    }
    for (int quiet = 0; result >= 0 && quiet < 2; quiet += !result) {
        result = native_link_receive(link);
        take_done(link, result);
    }
    if (!input[MUTATED])
        for (unsigned post = 0; post < post_count(); post++)
            assert(result != LINK_WRONG && !memories[post].under_way);
}

static void run_input(void)
{
    int pair[2];
    size_t at = SETTING_BYTES + post_count() * POST_BYTES, rest = input_length - at, early = 0;
    assert(input_length >= at);
    assert(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
    if (!(input[EARLY] % 2)) /* behind the handshake */
        early = draw((rest < LINK_BUFFER_BYTES ? rest : LINK_BUFFER_BYTES) + 1);
    struct native_link *link = native_link_open(pair[0], input + at, early);
    assert(link);
    memset(memories, 0, sizeof memories);
    for (unsigned post = 0; post < post_count(); post++) {
        const uint8_t *what = input + SETTING_BYTES + post * POST_BYTES;
        struct memory *memory = &memories[post];
        take_memory(memory, what, post);
        memory->place = native_link_post(link, post, 0, 0, 0, memory->length, post_ways(what),
                                         memory->data, memory->sums);
        assert(memory->place == (int)post);
        memory->under_way = 1;
    }
    assert(!send_all(link, pair[1]));
    talk(link, pair[1], at + early);
    native_link_free(link);
    for (unsigned post = 0; post < POSTS_MAX; post++)
        free_memory(&memories[post]);
    close(pair[0]);
    close(pair[1]);
}

int main(int count, char **arguments)
{
    native_crc32c_select(-1);
    return run_inputs(count, arguments);
}
