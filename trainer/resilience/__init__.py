"""Keeps a run alive and correct: stop requests, guards, the watchdog, quarantine, the ledger of time."""
