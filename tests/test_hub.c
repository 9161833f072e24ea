/* Names, hashes and lists of the hub; what goes over the wire is tested in tests/hub. */
#include "hub/internal.h"
#include "hub/sha1.h"
#include "testing.h"

static void names_of_repositories(void **state) {
    (void)state;
    static const char *const good[] = {"openai/gpt-oss-20b", "a/b", "o_1/R.x-2"};
    static const char *const bad[] = {"",     "a",    "/a",    "a/",    "a/b/c",  "../a", "a/..",  "a/.b",
                                      "-a/b", "a/-b", "a b/c", "a/b:c", "a\\b/c", "a/b?", "a/b%2e"};
    for (size_t i = 0; i < ORCD_COUNT(good); i++)
        assert_true(hub_is_repo(good[i]));
    for (size_t i = 0; i < ORCD_COUNT(bad); i++)
        assert_false(hub_is_repo(bad[i]));
}

static void names_of_files(void **state) {
    (void)state;
    static const char *const good[] = {"a.gguf", "sub/model-00001-of-00002.safetensors", "1/2/3/4/5/6/7/8"};
    static const char *const bad[] = {
        "",    "/a",   "a/",   "a//b", "..", "a/../b", "./a",   ".hidden", "a/.orcd/b",        "a\\b",
        "a:b", "a\nb", "~/a*", "-rf",  " a", "a ",     "a/ /b", "\xff",    "1/2/3/4/5/6/7/8/9"};
    char longest[HUB_FILE + 1];
    for (size_t i = 0; i < ORCD_COUNT(good); i++)
        assert_true(hub_is_file(good[i]));
    for (size_t i = 0; i < ORCD_COUNT(bad); i++)
        assert_false(hub_is_file(bad[i]));
    memset(longest, 'a', sizeof longest);
    longest[HUB_FILE] = '\0';
    assert_false(hub_is_file(longest));
    longest[201] = '\0'; /* one part */
    assert_false(hub_is_file(longest));
    longest[200] = '\0';
    assert_true(hub_is_file(longest));
}

static void sha1_is(const void *bytes, size_t n, size_t step, const char *want) {
    sha1 s;
    uint8_t sum[20];
    char hex[41];
    sha1_init(&s);
    for (size_t at = 0; at < n; at += step)
        sha1_update(&s, (const char *)bytes + at, n - at < step ? n - at : step);
    sha1_final(&s, sum);
    for (int i = 0; i < 20; i++)
        snprintf(hex + 2 * i, 3, "%02x", sum[i]);
    assert_string_equal(hex, want);
}

/* FIPS 180's examples, and lengths around the padding by hashlib. */
static void sha1_of_known_texts(void **state) {
    (void)state;
    static char many[1000000];
    sha1_is("", 0, 1, "da39a3ee5e6b4b0d3255bfef95601890afd80709");
    sha1_is("abc", 3, 1, "a9993e364706816aba3e25717850c26c9cd0d89d");
    sha1_is("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 56, 5,
            "84983e441c3bd26ebaae4aa1f95129e5e54670f1");
    memset(many, 'a', sizeof many);
    sha1_is(many, sizeof many, 4093, "34aa973cd4c4daa4f61eeb2bdbad27316534016f");
    sha1_is(many, 55, 55, "c1c8bbdc22796e28c0e15163d20899b65621d65a");
    sha1_is(many, 64, 3, "0098ba824b5c16427bd7a1122a5a442a25ec644d");
    sha1_is(many, 119, 119, "ee971065aaa017e0632a8ca6c77bb3bf8b1dfc56");
    sha1_is(many, 120, 7, "f34c1488385346a55709ba056ddd08280dd4c6d6");
}

static hub_tree tree_of(const char *json) {
    hub_tree t = {0};
    orcd_error err = {0};
    if (hub_tree_add(&t, json, strlen(json), &err) != ORCD_OK)
        fail_msg("%s", err.message);
    return t;
}

#define OID "0123456789012345678901234567890123456789"
#define FILE_OF(name) "{\"type\": \"file\", \"path\": \"" name "\", \"size\": 5, \"oid\": \"" OID "\"}"

static void weights_twice_in_a_repository(void **state) {
    (void)state;
    hub_tree t = tree_of("[" FILE_OF("model.safetensors.index.json") ", " FILE_OF("config.json") "]");
    static const char *const page[] = {
        "[" FILE_OF("original/model.safetensors") ", " FILE_OF("metal/model.bin") "]",
        "[" FILE_OF("model-00001-of-00002.safetensors") ", " FILE_OF("a.gguf") "]",
    };
    for (size_t i = 0; i < ORCD_COUNT(page); i++)
        assert_int_equal(hub_tree_add(&t, page[i], strlen(page[i]), NULL), ORCD_OK);
    const hub_entry *chosen[8];
    size_t n;
    bool folder;
    orcd_error err = {0};
    assert_int_equal(hub_choose(&t, "o/r", NULL, chosen, &n, &folder, &err), ORCD_OK);
    assert_true(folder);
    assert_int_equal(n, 3);
    assert_int_equal(hub_choose(&t, "o/r", "A.GGUF", chosen, &n, &folder, &err), ORCD_OK);
    assert_false(folder);
    assert_string_equal(chosen[0]->path, "a.gguf");
    hub_tree_free(&t);
}

static void config_without_weights_is_no_folder(void **state) {
    (void)state;
    hub_tree t = tree_of("[" FILE_OF("config.json") "," FILE_OF("x.gguf") "]");
    const hub_entry *chosen[4];
    size_t n;
    bool folder;
    orcd_error err = {0};
    assert_int_equal(hub_choose(&t, "o/r", NULL, chosen, &n, &folder, &err), ORCD_OK);
    assert_false(folder);
    hub_tree_free(&t);
}

/* Every prefix, and every byte replaced: an error or entries with allowed names. */
static void damaged_lists(void **state) {
    (void)state;
    static const char list[] = "[" FILE_OF("a.gguf") ",{\"type\":\"file\",\"path\":\"b\",\"size\":3,\"oid\":\"" OID
                                                     "\",\"lfs\":{\"oid\":\"" OID OID "\",\"size\":3}}]";
    char copy[sizeof list];
    for (size_t i = 0; i < sizeof list; i++)
        for (int c = -1; c < 256; c++) {
            hub_tree t = {0};
            memcpy(copy, list, sizeof list);
            if (c >= 0 && i < sizeof list - 1)
                copy[i] = (char)c;
            if (hub_tree_add(&t, copy, c < 0 ? i : sizeof list - 1, NULL) == ORCD_OK)
                for (size_t k = 0; k < t.n; k++)
                    assert_true(hub_is_file(t.entry[k].path) && t.entry[k].size < 100000);
            hub_tree_free(&t);
        }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(names_of_repositories),
        cmocka_unit_test(names_of_files),
        cmocka_unit_test(sha1_of_known_texts),
        cmocka_unit_test(weights_twice_in_a_repository),
        cmocka_unit_test(config_without_weights_is_no_folder),
        cmocka_unit_test(damaged_lists),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
