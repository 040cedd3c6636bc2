// Command failover measures for how long nothing commits after a leader stops:
// because it is silent, or because its process is killed. See the README of this
// module.
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
	"runtime"
	"slices"
	"strings"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "failover:", err)
		os.Exit(1)
	}
}

const (
	silent = "silent" // its connections stay open and carry nothing, in both directions
	dead   = "dead"   // kill -9: its connections are closed by the system
)

type options struct {
	runs    int
	ways    []string
	dir     string
	json    string
	procs   int
	idle    bool   // nobody writes before the leader stops
	node    string // set in the processes that the command starts itself
	members string
}

func parse(args []string, help io.Writer) (options, error) {
	var o options
	var ways string
	f := flag.NewFlagSet("failover", flag.ContinueOnError)
	f.SetOutput(help)
	f.IntVar(&o.runs, "runs", 100, "runs of each way; they alternate")
	f.StringVar(&ways, "ways", silent+","+dead, "how the leader stops")
	f.StringVar(&o.dir, "dir", "", "where the data goes, on a disk (default: the current directory)")
	f.StringVar(&o.json, "json", "", "also write every run's time to this file")
	f.BoolVar(&o.idle, "idle", false, "nobody writes before the leader stops, at a random moment between two heartbeats; otherwise a closed-loop client does")
	f.IntVar(&o.procs, "procs", 8, "GOMAXPROCS")
	f.StringVar(&o.node, "node", "", "used by the command itself: the node to run")
	f.StringVar(&o.members, "members", "", "used by the command itself: all nodes")
	if err := f.Parse(args); err != nil {
		return o, err
	}
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if f.NArg() > 0 {
		bad("unexpected argument %q; every setting is a flag, see -h", f.Arg(0))
	}
	for way := range strings.SplitSeq(ways, ",") {
		if way != silent && way != dead {
			bad("-ways: %q is neither %s nor %s", way, silent, dead)
		}
		o.ways = append(o.ways, way)
	}
	if o.runs < 1 || o.procs < 1 {
		bad("-runs and -procs must be more than 0")
	}
	return o, errors.Join(errs...)
}

func run(ctx context.Context, args []string, stdin io.Reader, stdout, progress io.Writer) error {
	o, err := parse(args, progress)
	if err != nil {
		return err
	}
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(o.procs))
	if o.node != "" {
		return child(ctx, o, stdin, stdout)
	}
	moved := 0 // runs that did not count
	took := map[string][]time.Duration{}
	for i := range o.runs {
		for _, way := range o.ways {
			measure := runSilent
			if way == dead {
				measure = runDead
			}
			d, err := measure(ctx, o)
			for ; errors.Is(err, errMoved) && moved < o.runs; moved++ {
				d, err = measure(ctx, o)
			}
			if err != nil {
				return fmt.Errorf("%s, run %d: %w", way, i+1, err)
			}
			took[way] = append(took[way], d)
			fmt.Fprintf(progress, "%s, run %d of %d: %v\n", way, i+1, o.runs, d.Round(100*time.Microsecond))
		}
	}
	fmt.Fprintf(stdout, "%s, %d CPUs, GOMAXPROCS %d, heartbeat %v, election timeout %v: from the moment the leader stops to the next acknowledged commit\n",
		runtime.Version(), runtime.NumCPU(), o.procs, heartbeat, election)
	if o.idle {
		fmt.Fprintln(stdout, "nobody writes before the leader stops")
	}
	if moved > 0 {
		fmt.Fprintf(stdout, "%d runs were repeated because leadership had moved before the stop: the machine is busy, and these figures are too high\n", moved)
	}
	for _, way := range o.ways {
		report(stdout, way, took[way])
	}
	if o.json == "" {
		return nil
	}
	b, err := json.MarshalIndent(took, "", "\t") // nanoseconds
	if err != nil {
		return err
	}
	return os.WriteFile(o.json, append(b, '\n'), 0o644)
}

// bucket is the width of a bar of the histogram.
const bucket = 10 * time.Millisecond

func report(w io.Writer, way string, took []time.Duration) {
	s := slices.Sorted(slices.Values(took))
	n := len(s)
	ms := func(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
	fmt.Fprintf(w, "\nleader %s, %d runs: median %.1f ms, p90 %.1f ms, lowest %.1f ms, max %.1f ms\n",
		way, n, ms(s[(n-1)/2]+s[n/2])/2, ms(s[(n*9+9)/10-1]), ms(s[0]), ms(s[n-1]))
	counts := map[time.Duration]int{}
	for _, d := range s {
		counts[d/bucket]++
	}
	for b := s[0] / bucket; b <= s[n-1]/bucket; b++ {
		if counts[b] == 0 && counts[b-1] == 0 {
			continue // a gap is one empty line
		}
		fmt.Fprintf(w, "%5d-%d ms %s %d\n", (b * bucket).Milliseconds(), ((b + 1) * bucket).Milliseconds(), strings.Repeat("#", counts[b]), counts[b])
	}
}
