// Command operate has the commands of docs/OPERATING.md, which look at data
// directories and backups of any service, and a small service to try them on.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"example.com/raft"
)

const usage = `operate looks at data directories whose nodes do not run, and at backups.

  operate inspect [-json] DIR...
      what the directories hold, and what they tell together; changes nothing
  operate recover -lost b,c [-other d.json,DIR2]... [-do] DIR
      make a cluster of DIR, when the quorum is lost for good. Without -do it
      only says what would be done, and which entries may be lost.
  operate verify FILE
      read all of a backup, - for standard input
  operate restore -id a -addr HOST:PORT -cluster NAME FILE DIR
      make DIR the data directory of a new cluster with the state of a backup
  operate run -id a -dir DIR -addr HOST:PORT -http HOST:PORT [-founders a=HOST:PORT,...]
      run a node of a small service; without -founders it waits to be added
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command(ctx, os.Args[1:], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintf(os.Stderr, "operate: %v\n", err)
		os.Exit(1)
	}
}

func command(ctx context.Context, args []string, stdin io.Reader, stdout io.Writer) error {
	commands := map[string]func(context.Context, *flag.FlagSet, []string, io.Reader, io.Writer) error{
		"inspect": inspect, "recover": recoverDir, "verify": verify, "restore": restore, "run": run,
	}
	if len(args) == 0 || commands[args[0]] == nil {
		return fmt.Errorf("want a command\n\n%s", usage)
	}
	f := flag.NewFlagSet(args[0], flag.ContinueOnError)
	f.Usage = func() {
		fmt.Fprint(f.Output(), usage, "\nThe flags of "+f.Name()+":\n")
		f.PrintDefaults()
	}
	err := commands[args[0]](ctx, f, args[1:], stdin, stdout)
	if errors.Is(err, flag.ErrHelp) {
		return nil
	}
	return err
}

// parse reads the flags. Between least and most arguments must be left.
func parse(f *flag.FlagSet, args []string, least, most int) error {
	if err := f.Parse(args); err != nil {
		return err
	}
	if f.NArg() < least || f.NArg() > most {
		return fmt.Errorf("%s has %d arguments behind its flags: see operate %s -h", f.Name(), f.NArg(), f.Name())
	}
	return nil
}

func inspect(ctx context.Context, f *flag.FlagSet, args []string, _ io.Reader, stdout io.Writer) error {
	asJSON := f.Bool("json", false, "print each report as a line of JSON, to be compared on another machine")
	if err := parse(f, args, 1, 99); err != nil {
		return err
	}
	var reports []raft.DirectoryReport
	var problems []error
	for _, dir := range f.Args() {
		r, err := reportOf(ctx, dir)
		if err != nil {
			return err
		}
		if reports = append(reports, r); r.Problem != "" {
			problems = append(problems, errors.New(r.Problem))
		}
		if *asJSON {
			if err := json.NewEncoder(stdout).Encode(r); err != nil {
				return err
			}
			continue
		}
		fmt.Fprint(stdout, r)
	}
	if len(reports) > 1 && !*asJSON {
		survey, err := raft.SurveyDirectories(reports...)
		fmt.Fprint(stdout, survey)
		problems = append(problems, err)
	}
	return errors.Join(problems...)
}

// reportOf inspects a directory, or reads the report of one on another machine
// from a file NAME.json.
func reportOf(ctx context.Context, name string) (r raft.DirectoryReport, err error) {
	if filepath.Ext(name) != ".json" {
		return raft.Inspect(ctx, name), nil
	}
	b, err := os.ReadFile(name)
	if err == nil {
		err = json.Unmarshal(b, &r)
	}
	if err != nil {
		return r, fmt.Errorf("%s: %w; want what operate inspect -json printed for one directory", name, err)
	}
	return r, nil
}

func recoverDir(ctx context.Context, f *flag.FlagSet, args []string, _ io.Reader, stdout io.Writer) error {
	o := raft.RecoverOptions{DryRun: true}
	f.BoolFunc("do", "do it; otherwise it is only said what would be done", func(string) error { o.DryRun = false; return nil })
	f.Func("lost", "`voters` whose data is gone for good, as b,c", func(s string) error {
		for id := range strings.SplitSeq(s, ",") {
			o.Lost = append(o.Lost, raft.NodeID(id))
		}
		return nil
	})
	f.Func("other", "`directories` that survive too, or reports of such, as DIR,c.json", func(s string) error {
		for name := range strings.SplitSeq(s, ",") {
			r, err := reportOf(ctx, name)
			if err != nil {
				return err
			}
			o.Others = append(o.Others, r)
		}
		return nil
	})
	f.StringVar(&o.Addr, "addr", "", "`HOST:PORT` where others will reach the node, if not as before")
	f.BoolVar(&o.LoseEntries, "lose-entries", false, "lose what only a more up-to-date directory has")
	f.BoolVar(&o.AbandonQuorum, "abandon-quorum", false, "go on alone although enough directories survive")
	f.BoolVar(&o.NotMember, "not-member", false, "go on with a node that was removed, or not added yet")
	f.BoolVar(&o.AdoptCopy, "adopt-copy", false, "go on with a copy of a directory")
	if err := parse(f, args, 1, 1); err != nil {
		return err
	}
	plan, err := raft.Recover(ctx, f.Arg(0), o)
	if err != nil {
		return err
	}
	fmt.Fprint(stdout, plan)
	if o.DryRun {
		fmt.Fprintln(stdout, "to do it, give the same command with -do")
	}
	return nil
}

func verify(_ context.Context, f *flag.FlagSet, args []string, stdin io.Reader, stdout io.Writer) error {
	if err := parse(f, args, 1, 1); err != nil {
		return err
	}
	return withBackup(f.Arg(0), stdin, func(r io.Reader) error {
		info, err := raft.VerifyBackup(r)
		if err != nil {
			return err
		}
		e := json.NewEncoder(stdout)
		e.SetIndent("", "  ")
		return e.Encode(info)
	})
}

func restore(ctx context.Context, f *flag.FlagSet, args []string, stdin io.Reader, stdout io.Writer) error {
	id := f.String("id", "", "`node` that will run on the directory")
	addr := f.String("addr", "", "`HOST:PORT` where others will reach it")
	cluster := f.String("cluster", "", "`name` of the new cluster (Config.ClusterID)")
	from := f.String("from", "", "`name` of the cluster that the backup is of, if that is another one")
	if err := parse(f, args, 2, 2); err != nil {
		return err
	}
	return withBackup(f.Arg(0), stdin, func(r io.Reader) error {
		record, err := raft.RestoreBackup(ctx, f.Arg(1), r, raft.RestoreOptions{
			ID: raft.NodeID(*id), Addr: *addr, ClusterID: *cluster, FromCluster: *from,
		})
		if err == nil {
			fmt.Fprintln(stdout, record)
		}
		return err
	})
}

// withBackup opens a backup, - for standard input.
func withBackup(name string, stdin io.Reader, use func(io.Reader) error) error {
	if name == "-" {
		return use(stdin)
	}
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	return use(f)
}
