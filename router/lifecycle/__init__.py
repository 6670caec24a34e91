"""The life of adapters: which version a name means, how one follows another, what operators do."""
