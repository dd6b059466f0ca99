from mixquant_sglang.cli import main

raise SystemExit(main())
