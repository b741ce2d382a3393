"""Command `pema-server serve`."""

from __future__ import annotations

from plm_owner_server.cli.utf8_texts import Utf8Texts
from plm_owner_server.settings import ServerSettings


class Serve(Utf8Texts, ServerSettings):
    """Load a model and serve it over REST and gRPC.

    Every flag is also an environment variable, PEMA_<FLAG> (PEMA_MAX_SEQUENCES=64); a flag wins.

    Examples:
      pema-server serve                                    the embedded Gemma 3 270M on 127.0.0.1:8000
      pema-server serve --model smollm2-135m --port 9000   the other embedded model
      pema-server serve --model /models/llama --dtype bfloat16
      PEMA_MODEL=Qwen/Qwen3-0.6B pema-server serve --revision main --cr-kind ffn_output
      pema-server serve --model /models/llama-70b --engine vllm --tensor-parallel-size 8
    """

    def cli_cmd(self) -> None:
        """Serve until stopped. The exit status is 1 if the model cannot be served, or its engine has failed."""
        # Imported here, so that --help need not wait for torch.
        from plm_owner_server.cli.environment import warn_of_variables
        from plm_owner_server.cli.server_process import serve

        warn_of_variables()
        serve(self)
