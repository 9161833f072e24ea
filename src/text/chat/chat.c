#include "text/chat/chat.h"

bool chat_effort_of(const char *word, chat_effort *out) {
    static const struct {
        const char *word;
        chat_effort effort;
    } known[] = {
        {"none", CHAT_EFFORT_LOW},      {"minimal", CHAT_EFFORT_LOW}, {"low", CHAT_EFFORT_LOW},
        {"medium", CHAT_EFFORT_MEDIUM}, {"high", CHAT_EFFORT_HIGH},   {"xhigh", CHAT_EFFORT_HIGH},
        {"max", CHAT_EFFORT_HIGH},
    };
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
        if (strcmp(word, known[i].word) == 0) {
            *out = known[i].effort;
            return true;
        }
    return false;
}
