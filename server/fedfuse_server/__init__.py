"""What runs at the coordinator, and the auditor's tools."""
