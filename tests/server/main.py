"""Runs the server tests in the format of the other test programs."""
import sys
import unittest

from result import Result

MODULES = ["test_http", "test_worker", "test_api", "test_openai", "test_tools", "test_load", "test_faults"]

suite = unittest.TestSuite()
for item in sys.argv[1:] or MODULES:
    try:
        suite.addTests(unittest.defaultTestLoader.loadTestsFromName(item))
    except unittest.SkipTest as reason:  # the whole module needs what is not here
        print(f"SKIP: {item}: {reason}", flush=True)
result = unittest.TextTestRunner(stream=sys.stdout, resultclass=Result, verbosity=0).run(suite)
sys.exit(not result.wasSuccessful())
