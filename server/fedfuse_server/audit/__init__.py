"""The auditor's view of a ledger."""
