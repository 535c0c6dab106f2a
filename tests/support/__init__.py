"""What tests share: federations with real keys, rounds of the protocol core, honest ledgers."""
