"""Keys, signatures, derivation, sealing, sharing and keystreams: pure functions over pyca/cryptography."""
