/* An NVTX tool of our own: writes every call in every named domain to the file $NVTX_TAP_LOG, one line each.
 *
 *   D <domain> <hex name>                                              a domain was created
 *   C <domain> <category> <hex name>                                   a category was named
 *   P <tid> <domain> <category> <registered 0|1> <payload> <hex text>  push
 *   M (as P)                                                           mark
 *   O <tid> <domain>                                                   pop
 *   S (as P, an id in place of the thread)                             start of a range that may cross others
 *   E <id> <domain>                                                    its end
 *
 * A program loads it when NVTX_INJECTION64_PATH names it before the first NVTX call. Only the few definitions of the
 * NVTX interface that are needed here are written down; their numbers are those of the public nvtx3 headers.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { EXPORT_CALLBACKS = 1, MODULE_CORE2 = 5 };
enum { MARK = 1, START = 2, END = 3, PUSH = 4, POP = 5, NAME_CATEGORY = 8, REGISTER_STRING = 10, CREATE_DOMAIN = 12 };
enum { MESSAGE_ASCII = 1, MESSAGE_REGISTERED = 3 };
enum { PAYLOAD_NONE = 0, PAYLOAD_DOUBLE = 3 };

typedef void (*function)(void);

typedef struct {
    size_t size;
    int (*get_module)(int module, function*** table, unsigned int* count);
} callbacks;

typedef struct {
    uint16_t version, size;
    uint32_t category;
    int32_t color_type;
    uint32_t color;
    int32_t payload_type, reserved;
    union {
        int64_t whole;
        double real;
    } payload;
    int32_t message_type;
    const char* message; /* text, or what register_string returned */
} attributes;

static FILE* out;
static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;
static intptr_t domains;
static uint64_t started;

static void hex(const char* text) {
    for (const unsigned char* c = (const unsigned char*)(text ? text : ""); *c; ++c) fprintf(out, "%02x", *c);
    fputs(".\n", out);
    fflush(out);
}

static void* create_domain(const char* name) {
    pthread_mutex_lock(&guard);
    intptr_t made = ++domains;
    fprintf(out, "D %ld ", (long)made);
    hex(name);
    pthread_mutex_unlock(&guard);
    return (void*)made;
}

static const char* register_string(void* domain, const char* text) {
    (void)domain;
    return strdup(text);
}

static void name_category(void* domain, uint32_t category, const char* name) {
    pthread_mutex_lock(&guard);
    fprintf(out, "C %ld %u ", (long)(intptr_t)domain, category);
    hex(name);
    pthread_mutex_unlock(&guard);
}

static uint64_t event(char kind, void* domain, const attributes* a) {
    pthread_mutex_lock(&guard);
    uint64_t id = kind == 'S' ? ++started : (uint64_t)syscall(SYS_gettid);
    fprintf(out, "%c %lu %ld %u %d ", kind, (unsigned long)id, (long)(intptr_t)domain, a->category,
            a->message_type == MESSAGE_REGISTERED);
    if (a->payload_type == PAYLOAD_NONE)
        fputs("- ", out);
    else if (a->payload_type == PAYLOAD_DOUBLE)
        fprintf(out, "%.17g ", a->payload.real);
    else
        fprintf(out, "%lld ", (long long)a->payload.whole);
    hex(a->message_type == MESSAGE_ASCII || a->message_type == MESSAGE_REGISTERED ? a->message : "");
    pthread_mutex_unlock(&guard);
    return id;
}

static void mark(void* domain, const attributes* a) { event('M', domain, a); }

static int push(void* domain, const attributes* a) {
    event('P', domain, a);
    return 0;
}

static int pop(void* domain) {
    pthread_mutex_lock(&guard);
    fprintf(out, "O %ld %ld\n", syscall(SYS_gettid), (long)(intptr_t)domain);
    fflush(out);
    pthread_mutex_unlock(&guard);
    return 0;
}

static uint64_t start(void* domain, const attributes* a) { return event('S', domain, a); }

static void end(void* domain, uint64_t id) {
    pthread_mutex_lock(&guard);
    fprintf(out, "E %lu %ld\n", (unsigned long)id, (long)(intptr_t)domain);
    fflush(out);
    pthread_mutex_unlock(&guard);
}

int InitializeInjectionNvtx2(const void* (*get_export_table)(uint32_t)) {
    const callbacks* found = get_export_table(EXPORT_CALLBACKS);
    function** table = NULL;
    unsigned int count = 0;
    const char* path = getenv("NVTX_TAP_LOG");
    if (!out && !(path && (out = fopen(path, "w")))) return 0;
    if (!found || !found->get_module(MODULE_CORE2, &table, &count) || count <= CREATE_DOMAIN) return 0;
    *table[MARK] = (function)mark;
    *table[START] = (function)start;
    *table[END] = (function)end;
    *table[PUSH] = (function)push;
    *table[POP] = (function)pop;
    *table[NAME_CATEGORY] = (function)name_category;
    *table[REGISTER_STRING] = (function)register_string;
    *table[CREATE_DOMAIN] = (function)create_domain;
    return 1;
}
