"""Where slices come from: a module a provider, and what each of them needs."""
