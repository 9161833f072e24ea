"""Runs the server tests in the format of the other test programs."""
import sys
import time
import unittest

MODULES = ["test_http", "test_worker", "test_api", "test_openai", "test_tools", "test_load", "test_faults"]


class Result(unittest.TextTestResult):
    def startTest(self, test):
        super(unittest.TextTestResult, self).startTest(test)
        self.t0 = time.time()

    def say(self, word, test):
        print(f"{word} {test.id()} ({time.time() - self.t0:.1f} s)", flush=True)

    def addSuccess(self, test):
        self.say("[       OK ]", test)

    def addError(self, test, err):
        super(unittest.TextTestResult, self).addError(test, err)
        print(f"[  FAILED  ] {test.id()}", flush=True)

    def addFailure(self, test, err):
        super(unittest.TextTestResult, self).addFailure(test, err)
        self.say("[  FAILED  ]", test)

    def addSkip(self, test, reason):
        super(unittest.TextTestResult, self).addSkip(test, reason)
        print(f"SKIP: {test.id()}: {reason}", flush=True)


suite = unittest.TestSuite()
for item in sys.argv[1:] or MODULES:
    try:
        suite.addTests(unittest.defaultTestLoader.loadTestsFromName(item))
    except unittest.SkipTest as reason:  # the whole module needs what is not here
        print(f"SKIP: {item}: {reason}", flush=True)
result = unittest.TextTestRunner(stream=sys.stdout, resultclass=Result, verbosity=0).run(suite)
sys.exit(not result.wasSuccessful())
