/* Four users at once, two of them with one adapter and two with another, served in the same steps.
 *
 *     users MODEL.gguf ADAPTER_A ADAPTER_B
 *
 * An adapter is a GGUF adapter file or a PEFT folder. How to compile: docs/C_API.md.
 */
#include "ggraft.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define USERS 4
#define TOKENS 24

/* What a user has been told so far. */
typedef struct {
    ggraft_reply *reply;
    char text[1024];
    size_t length;
    int32_t done;
} user;

/* Stops the program when a function fails. */
static void check(ggraft_status status, const char *what)
{
    if (status != GGRAFT_OK) {
        fprintf(stderr, "error: %s: %s\n", what, ggraft_last_error());
        exit(EXIT_FAILURE);
    }
}

/* Text arrives in whole characters. What has no room is left out, and ends the answer. */
static int32_t append(const char *text, size_t length, void *user_data)
{
    user *u = user_data;
    if (length >= sizeof u->text - u->length)
        return 1;
    memcpy(u->text + u->length, text, length);
    u->length += length;
    return 0;
}

int main(int argc, char **argv)
{
    static const char *const prompts[USERS] = {
        "There is no rope left in the market.\n",
        "There is no rope left in the market.\n",
        "The rain has not stopped for three days.\n",
        "The rain has not stopped for three days.\n",
    };
    user users[USERS];
    ggraft_model *model;
    ggraft_adapter *adapters[2];
    ggraft_engine_params params;
    ggraft_engine *engine;
    ggraft_sampler_params greedy;
    ggraft_generate_params generate;
    int i, left = USERS;

    if (argc != 4) {
        fprintf(stderr, "usage: %s MODEL.gguf ADAPTER_A ADAPTER_B\n", argv[0]);
        return 2;
    }
    check(ggraft_model_open(argv[1], NULL, &model), "open");
    for (i = 0; i < 2; i++)
        check(ggraft_adapter_load(model, argv[2 + i], &adapters[i]), argv[2 + i]);

    check(ggraft_engine_params_init(&params, sizeof params), "engine params");
    params.n_ctx = 512;
    params.n_threads = 1; /* enough for the tiny model of this repository; 0 takes one for each core */
    check(ggraft_engine_new(model, &params, &engine), "engine");

    check(ggraft_sampler_params_init(&greedy, sizeof greedy), "sampler params");
    greedy.temperature = 0.0f;
    check(ggraft_generate_params_init(&generate, sizeof generate), "generate params");
    generate.sampler = &greedy;
    generate.max_tokens = TOKENS;

    memset(users, 0, sizeof users);
    for (i = 0; i < USERS; i++)
        check(ggraft_engine_submit(engine, prompts[i], adapters[i % 2], &generate, 0, &users[i].reply), "submit");

    /* One thread listens to all of them, without waiting for any. A program with other things to do would do them here. */
    while (left > 0) {
        for (i = 0; i < USERS; i++) {
            user *u = &users[i];
            if (u->done)
                continue;
            check(ggraft_reply_poll(u->reply, append, u, &u->done, NULL, 0), "poll");
            left -= u->done != 0;
        }
    }
    for (i = 0; i < USERS; i++) {
        printf("[user %d, adapter %c] %s\n", i + 1, "AB"[i % 2], users[i].text);
        ggraft_reply_free(users[i].reply);
    }

    ggraft_engine_free(engine);
    for (i = 0; i < 2; i++)
        ggraft_adapter_free(adapters[i]);
    ggraft_model_free(model);
    fflush(stdout);
    return EXIT_SUCCESS;
}
