"""What keeps a run alive and honest: requests, guards, the watchdog, quarantine, the ledger of time."""
