"""PML, the Prompt Markup Language: text in, validated trees out. Knows nothing of tokens or models."""
