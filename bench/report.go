package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"text/tabwriter"
)

// row is one line of a table: one system at one number of clients, as medians
// over the rounds.
type row struct {
	System      string  `json:"system"`
	Clients     int     `json:"clients"`
	Rounds      int     `json:"rounds"`
	OpsPerSec   float64 `json:"ops_per_sec"`
	Ratio       *ratio  `json:"ratio_to_pump,omitempty"` // nil where the pump did not run
	P50         float64 `json:"p50_ms"`
	P99         float64 `json:"p99_ms"`
	CPUPer100k  float64 `json:"cpu_seconds_per_100k_ops"`
	AllocsPerOp float64 `json:"allocs_per_op"`
	Goroutines  int     `json:"goroutines"`      // the most of any round
	Left        int     `json:"goroutines_left"` // the most of any round
	RSSMiB      float64 `json:"rss_mib"`         // the most of any round
}

// ratio is a share of the pump's proposals per second: taken round by round,
// then the median, with the lowest and highest round as its interval.
type ratio struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

// result is what -json writes.
type result struct {
	Machine  machine  `json:"machine"`
	Args     []string `json:"args"`
	Size     int      `json:"payload_bytes"`
	Interval string   `json:"interval"`
	Rows     []row    `json:"rows"`
	Samples  []sample `json:"samples"`
}

type machine struct {
	Go         string `json:"go"`
	OS         string `json:"os"`
	Arch       string `json:"arch"`
	CPUs       int    `json:"cpus"`
	GOMAXPROCS int    `json:"gomaxprocs"`
	FileSystem string `json:"file_system"`
}

const intervalMeaning = "median, lowest and highest of the rounds' own ratios"

// median returns the middle value, or the mean of the two middle ones.
func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(v))
	n := len(s)
	return (s[(n-1)/2] + s[n/2]) / 2
}

// medianOf is the median of one figure over the samples.
func medianOf(samples []sample, figure func(sample) float64) float64 {
	var v []float64
	for _, s := range samples {
		v = append(v, figure(s))
	}
	return median(v)
}

// ratioToPump pairs each of the system's samples with the pump's of the same
// round. It is nil when no round has both.
func ratioToPump(system, pump []sample) *ratio {
	var shares []float64
	for _, s := range system {
		for _, p := range pump {
			if p.Round == s.Round && p.OpsPerSec > 0 {
				shares = append(shares, s.OpsPerSec/p.OpsPerSec)
			}
		}
	}
	if len(shares) == 0 {
		return nil
	}
	return &ratio{Median: median(shares), Min: slices.Min(shares), Max: slices.Max(shares)}
}

// summarize makes one row per system and number of clients, in the order given.
func summarize(samples []sample, systems []string, clients []int) []row {
	pick := func(system string, clients int) []sample {
		var picked []sample
		for _, s := range samples {
			if s.System == system && s.Clients == clients {
				picked = append(picked, s)
			}
		}
		return picked
	}
	var rows []row
	for _, n := range clients {
		pump := pick(pumpName, n)
		for _, system := range systems {
			own := pick(system, n)
			if len(own) == 0 {
				continue
			}
			r := row{
				System: system, Clients: n, Rounds: len(own),
				OpsPerSec:   medianOf(own, func(s sample) float64 { return s.OpsPerSec }),
				Ratio:       ratioToPump(own, pump),
				P50:         medianOf(own, func(s sample) float64 { return s.P50 }),
				P99:         medianOf(own, func(s sample) float64 { return s.P99 }),
				CPUPer100k:  medianOf(own, func(s sample) float64 { return s.CPUPer100k }),
				AllocsPerOp: medianOf(own, func(s sample) float64 { return s.AllocsPerOp }),
			}
			for _, s := range own {
				r.Goroutines = max(r.Goroutines, s.Goroutines)
				r.Left = max(r.Left, s.Left)
				r.RSSMiB = max(r.RSSMiB, s.RSSMiB)
			}
			rows = append(rows, r)
		}
	}
	return rows
}

// printTables writes one table per number of clients.
func printTables(w io.Writer, res result) error {
	fmt.Fprintf(w, "%s %s/%s, %d CPUs, GOMAXPROCS %d, %s, payloads of %d bytes\n",
		res.Machine.Go, res.Machine.OS, res.Machine.Arch, res.Machine.CPUs, res.Machine.GOMAXPROCS, res.Machine.FileSystem, res.Size)
	fmt.Fprintf(w, "of pump: %s\n", res.Interval)
	last := 0
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	for _, r := range res.Rows {
		if r.Clients != last {
			last = r.Clients
			if err := t.Flush(); err != nil {
				return err
			}
			fmt.Fprintf(w, "\n%d clients, %d rounds\n", r.Clients, r.Rounds)
			fmt.Fprintln(t, "system\tops/s\tof pump\tp50 ms\tp99 ms\tCPU s/100k\tallocs/op\tgoroutines\tleft\tRSS MiB\t")
		}
		share := "-"
		if r.Ratio != nil {
			share = fmt.Sprintf("%.3f [%.3f, %.3f]", r.Ratio.Median, r.Ratio.Min, r.Ratio.Max)
		}
		fmt.Fprintf(t, "%s\t%.0f\t%s\t%.2f\t%.2f\t%.2f\t%.1f\t%d\t%d\t%.0f\t\n",
			r.System, r.OpsPerSec, share, r.P50, r.P99, r.CPUPer100k, r.AllocsPerOp, r.Goroutines, r.Left, r.RSSMiB)
	}
	return t.Flush()
}

func writeJSON(name string, res result) error {
	b, err := json.MarshalIndent(res, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(name, append(b, '\n'), 0o644)
}
