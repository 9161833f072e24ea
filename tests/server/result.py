"""A unittest result in the format of the other test programs."""
import time
import unittest


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
