/* Two adapters on one model: generate with the first, swap to the second between two tokens, swap back.
 *
 *     swap MODEL.gguf ADAPTER_A ADAPTER_B [PROMPT]
 *
 * An adapter is a GGUF adapter file or a PEFT folder. How to compile: docs/C_API.md.
 */
#include "ggraft.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define TOKENS_PER_TURN 24

static double now(void)
{
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* Stops the program when a function fails. */
static void check(ggraft_status status, const char *what)
{
    if (status != GGRAFT_OK) {
        fprintf(stderr, "error: %s: %s\n", what, ggraft_last_error());
        exit(EXIT_FAILURE);
    }
}

/* Text arrives in whole characters. The callback ends the generation at the end of a line. */
static int32_t show(const char *text, size_t length, void *user_data)
{
    size_t *shown = user_data;
    *shown += length;
    fputs(text, stdout);
    return length > 0 && text[length - 1] == '\n';
}

static void turn(ggraft_session *session, const char *label)
{
    ggraft_sampler_params greedy;
    ggraft_generate_params params;
    ggraft_generate_result result;
    size_t shown = 0;

    check(ggraft_sampler_params_init(&greedy, sizeof greedy), "sampler params");
    greedy.temperature = 0.0f;
    check(ggraft_generate_params_init(&params, sizeof params), "generate params");
    params.sampler = &greedy;
    params.max_tokens = TOKENS_PER_TURN;

    printf("[%s] ", label);
    check(ggraft_session_generate(session, &params, show, &shown, &result, sizeof result), "generate");
    printf("\n");
    fprintf(stderr, "%s: %u tokens, %zu bytes, %.0f tokens/s\n", label, (unsigned)result.n_tokens, shown,
            (double)result.decode_tokens / (result.decode_seconds > 0 ? result.decode_seconds : 1e-9));
}

static void swap(ggraft_session *session, const ggraft_adapter *adapter, const char *label)
{
    const double start = now();
    check(ggraft_session_swap(session, adapter, GGRAFT_TEXT_DROP), "swap");
    fprintf(stderr, "swap to %s: %.1f us\n", label, (now() - start) * 1e6);
}

static ggraft_adapter *load(const ggraft_model *model, const char *path, const char *label)
{
    const double start = now();
    ggraft_adapter *adapter;
    ggraft_adapter_info info;
    check(ggraft_adapter_load(model, path, &adapter), path);
    check(ggraft_adapter_get_info(adapter, &info, sizeof info), "adapter info");
    fprintf(stderr, "load %s: %u virtual tokens, %.2f ms\n", label, (unsigned)info.length, (now() - start) * 1e3);
    return adapter;
}

int main(int argc, char **argv)
{
    ggraft_model *model;
    ggraft_model_info info;
    ggraft_adapter *a, *b;
    ggraft_session_params params;
    ggraft_session *session;
    const char *prompt;
    double start;

    if (argc < 4 || argc > 5) {
        fprintf(stderr, "usage: %s MODEL.gguf ADAPTER_A ADAPTER_B [PROMPT]\n", argv[0]);
        return 2;
    }
    prompt = argc == 5 ? argv[4] : "There is no rope left in the market.\n";
    if (ggraft_abi_version() != GGRAFT_ABI_VERSION) {
        fprintf(stderr, "error: library %s does not fit the header\n", ggraft_version());
        return EXIT_FAILURE;
    }

    start = now();
    check(ggraft_model_open(argv[1], NULL, &model), "open");
    check(ggraft_model_get_info(model, &info, sizeof info), "model info");
    fprintf(stderr, "open %s, %u layers: %.1f ms\n", info.architecture, (unsigned)info.n_layer, (now() - start) * 1e3);

    a = load(model, argv[2], "A");
    b = load(model, argv[3], "B");

    check(ggraft_session_params_init(&params, sizeof params), "session params");
    params.n_ctx = 512;
    params.n_threads = 1; /* enough for the tiny model of this repository; 0 takes one for each core */
    check(ggraft_session_new(model, &params, &session), "session");

    /* Each adapter answers the prompt from the start: what the other one said is dropped. */
    swap(session, a, "A");
    check(ggraft_session_prompt(session, prompt), "prompt");
    turn(session, "A");

    swap(session, b, "B");
    check(ggraft_session_prompt(session, prompt), "prompt");
    turn(session, "B");

    swap(session, a, "A");
    check(ggraft_session_prompt(session, prompt), "prompt");
    turn(session, "A");

    /* Or the conversation goes on: the text so far is computed again under the other adapter. */
    start = now();
    check(ggraft_session_swap(session, b, GGRAFT_TEXT_RECOMPUTE), "swap");
    fprintf(stderr, "swap to B with %ld positions computed again: %.2f ms\n", (long)ggraft_session_n_past(session),
            (now() - start) * 1e3);
    turn(session, "A then B");

    /* The order does not matter: a session keeps what it uses. */
    ggraft_adapter_free(a);
    ggraft_adapter_free(b);
    ggraft_model_free(model);
    ggraft_session_free(session);
    fflush(stdout);
    return EXIT_SUCCESS;
}
