/* The bounded table behind previous_response_id. */
#include "serve/store.h"

#include <stdio.h>
#include <stdlib.h>

#include "testing.h"

enum { OWNER = 7, OTHER = 8 };

static store *open_store(size_t bytes) {
    store *s;
    orcd_error err;
    assert_int_equal(store_open(bytes, &s, &err), ORCD_OK);
    return s;
}

static void expect(store *s, uint64_t owner, const char *id, const char *text) {
    char *found = store_get(s, owner, id);
    if (text)
        assert_string_equal(found, text);
    else
        assert_null(found);
    free(found);
}

static void store__what_was_put_is_found_by_its_owner_alone(void **state) {
    (void)state;
    store *s = open_store(1 << 16);
    store_put(s, OWNER, "a", "one");
    store_put(s, OWNER, "b", "");
    expect(s, OWNER, "a", "one");
    expect(s, OWNER, "b", "");
    expect(s, OTHER, "a", NULL);
    expect(s, OWNER, "c", NULL);
    store_put(s, OWNER, "a", "two"); /* the newest counts */
    expect(s, OWNER, "a", "two");
    store_close(s);
}

static void store__the_oldest_are_forgotten(void **state) {
    (void)state;
    char id[16], text[1000];
    store *s = open_store(20000);
    memset(text, 'x', sizeof text);
    text[sizeof text - 1] = '\0';
    for (int i = 0; i < 1000; i++) {
        snprintf(id, sizeof id, "r%d", i);
        store_put(s, OWNER, id, text);
    }
    expect(s, OWNER, "r0", NULL);
    expect(s, OWNER, "r970", NULL);
    expect(s, OWNER, "r999", text);
    expect(s, OWNER, "r985", text);
    store_close(s);
}

static void store__what_is_larger_than_the_table_forgets_nothing(void **state) {
    (void)state;
    char text[1000];
    store *s = open_store(500);
    memset(text, 'x', sizeof text);
    text[sizeof text - 1] = '\0';
    store_put(s, OWNER, "small", "s");
    store_put(s, OWNER, "large", text);
    expect(s, OWNER, "small", "s");
    expect(s, OWNER, "large", NULL);
    store_close(s);
    store_close(NULL);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(store__what_was_put_is_found_by_its_owner_alone),
        cmocka_unit_test(store__the_oldest_are_forgotten),
        cmocka_unit_test(store__what_is_larger_than_the_table_forgets_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
