from mixquant_sglang.tools.cli import main

raise SystemExit(main())
