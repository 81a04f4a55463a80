/* An application of llama.cpp that grafts: two texts in the sequences of one context, each under an adapter of its own, decoded in the same batches.
 *
 *     host MODEL.gguf ADAPTER_A ADAPTER_B
 *
 * An adapter is a GGUF adapter file or a PEFT folder. The llama.cpp is the application's; of ggraft it needs libggraft_host only. How to compile: docs/PLUGIN.md.
 */
#include "ggraft.h"
#include "llama.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TEXTS 2
#define TOKENS 24
#define PROMPT "There is no rope left in the market.\n"

/* Stops the program when a function of ggraft fails: most return a status, or a position if there is none. */
static int32_t check(int64_t result, const char *what)
{
    if (result < 0) {
        fprintf(stderr, "error: %s: %s\n", what, ggraft_last_error());
        exit(EXIT_FAILURE);
    }
    return (int32_t)result;
}

static void *need(void *made, const char *what)
{
    if (made == NULL) {
        fprintf(stderr, "error: no %s\n", what);
        exit(EXIT_FAILURE);
    }
    return made;
}

/* The application's own functions, for a libllama that is linked statically. With a shared one ggraft_host_new finds them itself: pass NULL. */
static ggraft_function find(const char *name, void *user_data)
{
    (void)user_data;
#define FIND(function)              \
    if (strcmp(name, #function) == 0) \
        return (ggraft_function)function;
    GGRAFT_HOST_FUNCTIONS(FIND)
    return NULL;
}

static void quiet(enum ggml_log_level level, const char *text, void *user_data)
{
    (void)user_data;
    if (level == GGML_LOG_LEVEL_ERROR)
        fputs(text, stderr);
}

/* Adds a token to a batch, with logits if they are wanted. */
static void add(struct llama_batch *batch, llama_token token, llama_pos position, llama_seq_id seq, int logits)
{
    int i = batch->n_tokens++;
    batch->token[i] = token;
    batch->pos[i] = position;
    batch->n_seq_id[i] = 1;
    batch->seq_id[i][0] = seq;
    batch->logits[i] = (int8_t)logits;
}

static llama_token likeliest(const float *logits, int n)
{
    int best = 0, i;
    for (i = 1; i < n; i++)
        if (logits[i] > logits[best])
            best = i;
    return best;
}

int main(int argc, char **argv)
{
    struct llama_model_params model_params = llama_model_default_params();
    struct llama_context_params context_params = llama_context_default_params();
    struct llama_model *model;
    struct llama_context *context;
    const struct llama_vocab *vocab;
    struct llama_batch batch;
    llama_token prompt[64];
    llama_token next[TEXTS];
    llama_pos position[TEXTS];
    char text[TEXTS][1024] = { "", "" };
    ggraft_host *host;
    ggraft_adapter *adapter[TEXTS];
    ggraft_graft *graft[TEXTS];
    int n, seq, i;

    if (argc != 4) {
        fprintf(stderr, "usage: %s MODEL.gguf ADAPTER_A ADAPTER_B\n", argv[0]);
        return EXIT_FAILURE;
    }

    /* What the application does anyway. */
    llama_log_set(quiet, NULL);
    llama_backend_init();
    model = need(llama_model_load_from_file(argv[1], model_params), "model");
    context_params.n_ctx = 512;
    context_params.n_seq_max = TEXTS;
    context_params.n_threads = context_params.n_threads_batch = 1;
    context = need(llama_init_from_model(model, context_params), "context");
    vocab = llama_model_get_vocab(model);
    n = llama_tokenize(vocab, PROMPT, (int32_t)strlen(PROMPT), prompt, 64, true, false);
    if (n <= 0) {
        fputs("error: the prompt cannot be tokenized\n", stderr);
        return EXIT_FAILURE;
    }

    /* Each sequence begins with an adapter: its text stands behind it. */
    check(ggraft_host_new(find, NULL, context, argv[1], 0, &host), "host");
    for (seq = 0; seq < TEXTS; seq++) {
        check(ggraft_host_load(host, argv[2 + seq], &adapter[seq]), argv[2 + seq]);
        check(ggraft_host_prepare(host, adapter[seq], seq, &graft[seq]), "prepare");
        position[seq] = check(ggraft_host_attach(host, graft[seq], seq), "attach");
    }

    /* And all else is as it was: batches of both texts. */
    batch = llama_batch_init(64 * TEXTS, 0, 1);
    for (seq = 0; seq < TEXTS; seq++)
        for (i = 0; i < n; i++)
            add(&batch, prompt[i], position[seq]++, seq, i == n - 1);
    for (i = 0; i < TOKENS; i++) {
        int row = -1;
        if (llama_decode(context, batch) != 0) {
            fputs("error: llama_decode failed\n", stderr);
            return EXIT_FAILURE;
        }
        for (seq = 0; seq < TEXTS; seq++) {
            size_t length = strlen(text[seq]);
            int written;
            /* The next row whose logits were wanted. */
            do
                row++;
            while (!batch.logits[row]);
            next[seq] = likeliest(llama_get_logits_ith(context, row), llama_vocab_n_tokens(vocab));
            written = llama_token_to_piece(vocab, next[seq], text[seq] + length, (int32_t)(sizeof text[seq] - length - 1), 0, false);
            if (written > 0)
                text[seq][length + (size_t)written] = '\0';
        }
        batch.n_tokens = 0;
        for (seq = 0; seq < TEXTS; seq++)
            add(&batch, next[seq], position[seq]++, seq, 1);
    }
    for (seq = 0; seq < TEXTS; seq++)
        printf("[%s]\n%s\n", argv[2 + seq], text[seq]);

    for (seq = 0; seq < TEXTS; seq++) {
        ggraft_graft_free(graft[seq]);
        ggraft_adapter_free(adapter[seq]);
    }
    ggraft_host_free(host);
    llama_batch_free(batch);
    llama_free(context);
    llama_model_free(model);
    llama_backend_free();
    return EXIT_SUCCESS;
}
