"""Parts of models that objectives ask for: states of inner layers, and what is trained beside a policy."""
