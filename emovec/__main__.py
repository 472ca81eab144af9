from emovec.cli import main

main()
